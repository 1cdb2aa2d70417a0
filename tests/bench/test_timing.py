"""The harness itself, on a clock that the tests turn."""

from __future__ import annotations

import pytest

from espalier.bench import Timing, interleaved
from espalier.errors import InputError


class Clock:
    """Seconds that pass only when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def candidate(self, name: str, seconds: float):  # type: ignore[no-untyped-def]
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


def test_candidates_take_turns_and_every_other_round_runs_backwards() -> None:
    clock = Clock()
    runs = {"a": clock.candidate("a", 1), "b": clock.candidate("b", 2)}
    timings = interleaved(runs, rounds=3, warmup=1, clock=clock, settle=0.5, sleep=clock.sleep)
    assert clock.calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert list(timings) == ["a", "b"]
    assert timings["a"].seconds == pytest.approx((1.0,) * 3)
    assert timings["b"].seconds == pytest.approx((2.0,) * 3)


def test_rounds_are_reported_without_warmup() -> None:
    clock, done = Clock(), []
    interleaved({"a": clock.candidate("a", 1)}, rounds=3, warmup=2, on_round=done.append, clock=clock, settle=0)
    assert done == [1, 2, 3]


def test_percentiles() -> None:
    timing = Timing(tuple(float(value) for value in range(101)))
    assert (timing.p50, timing.p90, timing.p99) == (50, 90, 99)


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 0), (1, -1)])
def test_impossible_counts_are_refused(rounds: int, warmup: int) -> None:
    with pytest.raises(InputError, match="rounds must be at least 1"):
        interleaved({"a": lambda: None}, rounds=rounds, warmup=warmup)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to time"):
        interleaved({}, rounds=1)
