"""The scheduler: batches under a budget, order, bounds, and what becomes of work that is not done."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from espalier.errors import DeadlineError, InputShapeError, QueueFullError, SchedulerClosedError
from espalier.scheduler import Item, Limits, Queue, Scheduler


def items(*tokens: int, **options: Any) -> list[Item]:
    return [Item(f"payload {i}", count, i, **options) for i, count in enumerate(tokens)]


def tags(found: Sequence[Item]) -> list[Any]:
    return [item.tag for item in found]


def filled(limits: Limits, *waiting: Item) -> Queue:
    queue = Queue(limits)
    for item in waiting:
        queue.push(item, 0.0)
    return queue


def test_a_batch_takes_what_fits_in_order() -> None:
    queue = filled(Limits(tokens=10), *items(4, 5, 2, 3))
    assert tags(queue.pop(0.0)[0]) == [0, 1]
    assert (len(queue), queue.tokens) == (2, 5)
    assert tags(queue.pop(0.0)[0]) == [2, 3]
    assert queue.pop(0.0) == ([], [])


def test_a_batch_has_at_most_so_many_items() -> None:
    queue = filled(Limits(items=2), *items(1, 1, 1))
    assert tags(queue.pop(0.0)[0]) == [0, 1]


def test_the_urgent_come_first_and_models_do_not_mix() -> None:
    low, high = Item("", 1, "low", model="a", priority=5), Item("", 1, "high", model="a", priority=1)
    other = Item("", 1, "other", model="b", priority=3)
    queue = filled(Limits(), low, other, high)
    assert [tags(queue.pop(0.0)[0]) for _ in range(2)] == [["high", "low"], ["other"]]


def test_what_is_too_late_is_handed_back() -> None:
    queue = filled(Limits(), *items(1, deadline=1.0), Item("", 1, "later", deadline=9.0))
    batch, expired = queue.pop(5.0)
    assert (tags(batch), tags(expired)) == (["later"], [0])


def test_under_a_latency_bound_the_hopeless_step_back() -> None:
    queue = filled(Limits(latency=1.0), *items(5, 5))
    fresh = Item("", 5, "fresh")
    queue.push(fresh, 1.5)
    queue.speed[None].add(10, 1.0)
    assert tags(queue.pop(1.6)[0]) == ["fresh"]
    assert tags(queue.pop(1.6)[0]) == [0]  # a quarter of the bound, but at least one


def test_removed_items_give_up_their_room() -> None:
    waiting = items(4, 5, 2)
    queue = filled(Limits(), *waiting)
    assert queue.remove(waiting[1])
    assert not queue.remove(waiting[1])
    assert waiting[1].payload is None
    assert (len(queue), queue.tokens) == (2, 6)
    assert tags(queue.pop(0.0)[0]) == [0, 2]
    assert not queue.remove(waiting[0])
    assert len(queue) == 0


def test_how_long_what_waits_will_take() -> None:
    queue = filled(Limits(), *items(30, model="a"), Item("", 10, model="b"))
    assert queue.seconds == 0
    queue.speed["a"].add(100, 1.0)
    queue.speed["b"].add(100, 10.0)
    assert queue.seconds == pytest.approx(0.3 + 1.0)
    queue.pop(0.0)
    queue.pop(0.0)
    queue.forget("a")
    assert list(queue.speed) == ["b"]


def test_large_batches_count_most_for_the_speed() -> None:
    queue = filled(Limits(), *items(1))
    speed = queue.speed[None]
    speed.add(10, 1.0)
    for _ in range(3):
        speed.add(1000, 1.0)
    assert speed.seconds_per_token == pytest.approx(0.001, rel=0.3)


class Bench:
    """A scheduler with an engine that can be held."""

    def __init__(self, limits: Limits) -> None:
        self.go, self.running = threading.Event(), threading.Event()
        self.batches: list[list[Any]] = []
        self.results: dict[Any, Any] = {}
        self.scheduler = Scheduler(self._run, self._finish, limits)

    def _run(self, model: Any, payloads: list[Any]) -> list[Any]:
        self.batches.append(payloads)
        self.running.set()
        assert self.go.wait(10)
        if "bad" in payloads:
            raise ValueError("bad")
        return [f"ran {payload}" for payload in payloads]

    def _finish(self, done: list[Item], results: Sequence[Any]) -> None:
        self.results.update({item.tag: result for item, result in zip(done, results, strict=True)})

    def hold(self) -> None:
        self.scheduler.submit(Item("first", 1, "first"))
        assert self.running.wait(10)


def test_what_waits_runs_together() -> None:
    bench = Bench(Limits())
    bench.hold()
    bench.scheduler.submit(*items(1, 1, 1))
    bench.go.set()
    bench.scheduler.close()
    assert [len(batch) for batch in bench.batches] == [1, 3]
    assert bench.results == {"first": "ran first", **{i: f"ran payload {i}" for i in range(3)}}


def test_only_the_items_at_fault_fail() -> None:
    bench = Bench(Limits())
    bench.hold()
    bench.scheduler.submit(Item("good", 1, "good"), Item("bad", 1, "bad"))
    bench.go.set()
    bench.scheduler.close()
    assert bench.results["good"] == "ran good"
    assert isinstance(bench.results["bad"], ValueError)


def test_more_than_may_wait_is_refused() -> None:
    bench = Bench(Limits(waiting=2, tokens=10))
    bench.hold()
    bench.scheduler.submit(*items(1, 1))
    with pytest.raises(QueueFullError, match="2 sequences wait already") as caught:
        bench.scheduler.submit(Item("", 1))
    assert caught.value.retry_after > 0
    with pytest.raises(InputShapeError, match="budget of 10 tokens"):
        bench.scheduler.submit(Item("", 11))
    bench.go.set()
    bench.scheduler.close()
    with pytest.raises(SchedulerClosedError):
        bench.scheduler.submit(Item("", 1))


def test_more_than_takes_too_long_is_refused() -> None:
    bench = Bench(Limits(delay=1.0))
    bench.hold()
    bench.scheduler.submit(*items(10))
    bench.scheduler._queue.speed[None].add(10, 3.0)
    with pytest.raises(QueueFullError, match=r"takes 3\.00 s") as caught:
        bench.scheduler.submit(Item("", 1))
    assert caught.value.retry_after == pytest.approx(1.5)
    bench.go.set()
    bench.scheduler.close()


def test_cancelled_work_is_not_run_nor_reported() -> None:
    bench = Bench(Limits())
    bench.hold()
    waiting = items(1, 1)
    bench.scheduler.submit(*waiting)
    assert bench.scheduler.cancel(*waiting) == 2
    assert bench.scheduler.waiting == 0
    bench.go.set()
    bench.scheduler.drain()
    bench.scheduler.close()
    assert bench.results == {"first": "ran first"}


def test_closing_without_draining_fails_what_waits() -> None:
    bench = Bench(Limits())
    bench.hold()
    bench.scheduler.submit(*items(1))
    threading.Timer(0.05, bench.go.set).start()
    bench.scheduler.close(drain=False)
    assert isinstance(bench.results[0], SchedulerClosedError)
    assert bench.results["first"] == "ran first"


def test_deadlines_are_reported() -> None:
    bench = Bench(Limits())
    bench.hold()
    bench.scheduler.submit(*items(1, deadline=0.0))
    bench.go.set()
    bench.scheduler.close()
    assert isinstance(bench.results[0], DeadlineError)
