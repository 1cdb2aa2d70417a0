"""Lanes, the cache of graphs and the choice of kernels, with made-up devices and clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from espalier.gpu.lanes import Lanes, Recent
from espalier.gpu.tuning import Choices


class Device:
    """Counts what is under way."""

    def __init__(self, lanes: int) -> None:
        self.names = iter(range(lanes))
        self.busy: set[int] = set()
        self.most = 0
        self.enqueuing = threading.Lock()
        self.lanes: Lanes[int, int] = Lanes(lanes, lambda: next(self.names), self.enqueue)

    def enqueue(self, lane: int, work: int) -> Callable[[], int]:
        assert self.enqueuing.acquire(blocking=False), "two threads enqueue at once"
        try:
            if work < 0:
                raise ValueError("a bad batch")
            assert lane not in self.busy
            self.busy.add(lane)
            self.most = max(self.most, len(self.busy))
        finally:
            self.enqueuing.release()

        def finish() -> int:
            time.sleep(0.0005)
            self.busy.remove(lane)
            if work == 13:
                raise RuntimeError("the device failed")
            return work * work

        return finish


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_one_caller_keeps_every_lane_busy_and_gets_results_in_order(lanes: int) -> None:
    device = Device(lanes)
    assert list(device.lanes.run_all(range(10))) == [n * n for n in range(10)]
    assert device.most == lanes
    assert not device.busy


def test_callers_share_the_lanes_without_waiting_for_each_other_for_ever() -> None:
    device = Device(2)

    def call(first: int) -> list[int]:
        return list(device.lanes.run_all(range(first, first + 7)))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(100, 140)))
    assert found == [[n * n for n in range(first, first + 7)] for first in range(100, 140)]
    assert not device.busy


@pytest.mark.parametrize("bad", [-1, 13])
def test_a_failure_gives_its_lanes_back(bad: int) -> None:
    device = Device(2)
    with pytest.raises((ValueError, RuntimeError)):
        list(device.lanes.run_all([1, bad, 2, 3]))
    assert not device.busy
    assert list(device.lanes.run_all([4, 5, 6])) == [16, 25, 36]


def test_failures_one_after_another_give_every_lane_back() -> None:
    device = Device(3)
    with pytest.raises(RuntimeError):
        list(device.lanes.run_all([13, 13, 13]))
    assert list(device.lanes.run_all(range(6))) == [n * n for n in range(6)]
    assert device.most == 3


def test_a_caller_who_stops_reading_gives_its_lanes_back() -> None:
    device = Device(2)
    results = device.lanes.run_all(range(5))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert not device.busy


def test_recent_forgets_what_was_used_longest_ago() -> None:
    made: list[str] = []
    recent: Recent[str, str] = Recent(2)

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    assert [get(key) for key in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"]
    assert len(recent) == 2


def choices(times: dict[str, float], *, tune: bool = True) -> Choices[float]:
    def seconds(call: Callable[[], float]) -> float:
        call()
        return times[called[-1]]

    return Choices(lambda a, b: abs(a - b) < 0.1, seconds, tune=tune)


called: list[str] = []


def ways(**results: float | Exception) -> dict[str, Callable[[], float]]:
    def way(name: str, result: float | Exception) -> Callable[[], float]:
        def call() -> float:
            called.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        return call

    return {name: way(name, result) for name, result in results.items()}


def test_the_fastest_that_agrees_is_chosen_once() -> None:
    found = choices({"library": 3.0, "a": 2.0, "b": 1.0})
    assert found.run("key", ways(library=1.0, a=1.01, b=5.0)) == 1.01
    assert found.chosen == {"key": "a"}
    assert found.refused == {("key", "b"): "its result differs"}
    called.clear()
    found.run("key", ways(library=1.0, a=1.01, b=5.0))
    assert called == ["a"]


def test_what_fails_is_not_chosen() -> None:
    found = choices({"library": 3.0, "a": 2.0})
    assert found.run("key", ways(library=1.0, a=RuntimeError("out of shared memory"))) == 1.0
    assert found.refused == {("key", "a"): "RuntimeError: out of shared memory"}


def test_without_tuning_nothing_is_measured() -> None:
    called.clear()
    assert choices({}, tune=False).run("key", ways(library=1.0, a=1.0)) == 1.0
    assert called == ["library"]
