"""Ragged batches: what goes together, who goes first, and what happens when there is too much or too little time."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from espalier.errors import DeadlineError, InputError, InputShapeError, QueueFullError, SchedulerClosedError
from espalier.scheduler import Item, Limits, Queue, Scheduler, Speed, Turns


class Recorder:
    """A model that doubles numbers, and what became of each."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.results: dict[Any, Any] = {}
        self.gate = threading.Event()
        self.gate.set()

    def run(self, _: Hashable, payloads: list[Any]) -> list[Any]:
        self.gate.wait(10)
        self.batches.append(payloads)
        if any(payload is None for payload in payloads):
            raise ValueError("a bad one")
        return [2 * payload for payload in payloads]

    def finish(self, items: list[Item], results: Sequence[Any]) -> None:
        for item, result in zip(items, results, strict=True):
            self.results[item.tag] = result


def popped(queue: Queue, now: float = 0.0) -> list[Any]:
    batch, _ = queue.pop(now)
    return [item.tag for item in batch]


def test_batches_keep_the_budget_of_tokens_and_items() -> None:
    queue = Queue(Limits(tokens=100, items=3))
    for tag, tokens in enumerate([60, 30, 20, 5, 5, 5, 100]):
        queue.push(Item(tag, tokens, tag), 0.0)
    assert [popped(queue) for _ in range(4)] == [[0, 1], [2, 3, 4], [5], [6]]
    assert len(queue) == 0
    assert popped(queue) == []


def test_urgent_items_go_first_and_equals_in_order() -> None:
    queue = Queue(Limits(tokens=10))
    for tag, priority in enumerate([1, 1, 0, 1, 0]):
        queue.push(Item(tag, 5, tag, priority=priority), float(tag))
    assert [popped(queue) for _ in range(3)] == [[2, 4], [0, 1], [3]]


def test_a_batch_is_of_one_model() -> None:
    queue = Queue(Limits(tokens=100))
    for tag, model in enumerate("abab"):
        queue.push(Item(tag, 5, tag, model=model), float(tag))
    assert [popped(queue) for _ in range(2)] == [[0, 2], [1, 3]]


def test_expired_items_are_not_run() -> None:
    queue = Queue(Limits())
    queue.push(Item(0, 5, "old", deadline=1.0), 0.0)
    queue.push(Item(0, 5, "new", deadline=9.0), 0.0)
    batch, expired = queue.pop(2.0)
    assert [item.tag for item in batch] == ["new"]
    assert [item.tag for item in expired] == ["old"]
    assert len(queue) == 0


def test_under_a_latency_bound_batches_are_short_and_late_items_step_back() -> None:
    queue = Queue(Limits(tokens=10_000, latency=1.0))
    for tag in range(6):
        queue.push(Item(tag, 50, tag), 0.1 * tag)
    queue.speed[None].add(1000, 1.0, 1.0)  # 1 ms a token: a quarter of the bound is 250 tokens
    # At 1.0, items 0 and 1 would be answered after 1.0 and 1.1 with 50 ms of work: 0 cannot make it any more.
    assert popped(queue, 1.0) == [1, 2, 3, 4, 5]
    assert popped(queue, 1.3) == [0]


def test_results_arrive_and_work_gathers_while_the_engine_is_busy() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(tokens=100))
    scheduler.submit(Item(0, 10, 0))
    while scheduler.waiting:
        time.sleep(0.001)
    scheduler.submit(*[Item(n, 10, n) for n in range(1, 6)])
    recorder.gate.set()
    scheduler.drain()
    scheduler.close()
    assert recorder.batches == [[0], [1, 2, 3, 4, 5]]
    assert recorder.results == {n: 2 * n for n in range(6)}


def test_a_batch_is_made_up_when_the_engine_is_free_for_it() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(tokens=100), workers=2)
    for n in range(6):
        scheduler.submit(Item(n, 10, n))
        time.sleep(0.01)  # an idle worker must not take it
    assert scheduler.waiting == 5
    recorder.gate.set()
    scheduler.close()
    assert recorder.batches == [[0], [1, 2, 3, 4, 5]]


def test_a_full_batch_is_at_hand_while_the_engine_is_busy() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(tokens=20), workers=2)
    scheduler.submit(Item(0, 10, 0))
    while scheduler.waiting:
        time.sleep(0.001)
    scheduler.submit(*[Item(n, 10, n) for n in range(1, 4)])
    while scheduler.waiting > 1:
        time.sleep(0.001)
    recorder.gate.set()
    scheduler.close()
    assert sorted(recorder.batches) == [[0], [1, 2], [3]]


def test_an_engine_of_two_lanes_gets_two_batches_at_once() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(tokens=100), workers=2, lanes=2)
    for n in range(2):
        scheduler.submit(Item(n, 10, n))
        while scheduler.waiting:
            time.sleep(0.001)
    recorder.gate.set()
    scheduler.close()
    assert sorted(recorder.batches) == [[0], [1]]


def test_only_the_item_at_fault_fails() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish)
    scheduler.submit(Item(1, 1, "a"), Item(None, 1, "b"), Item(3, 1, "c"))
    recorder.gate.set()
    scheduler.close()
    assert recorder.results["a"] == 2
    assert recorder.results["c"] == 6
    assert isinstance(recorder.results["b"], ValueError)


def test_a_full_queue_refuses_all_or_nothing_and_says_when_to_return() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(waiting=3, items=1))
    scheduler.submit(Item(0, 1, 0))
    while scheduler.waiting:
        time.sleep(0.001)
    scheduler.submit(Item(1, 1, 1), Item(2, 1, 2))
    with pytest.raises(QueueFullError, match="2 sequences wait already, and at most 3 may") as caught:
        scheduler.submit(Item(3, 1, 3), Item(4, 1, 4))
    assert caught.value.retry_after > 0
    scheduler.submit(Item(5, 1, 5))
    recorder.gate.set()
    scheduler.close()
    assert sorted(recorder.results) == [0, 1, 2, 5]


def test_an_item_larger_than_a_batch_is_refused() -> None:
    scheduler = Scheduler(Recorder().run, Recorder().finish, Limits(tokens=10))
    with pytest.raises(InputShapeError, match="a sequence of 11 tokens exceeds the budget of 10"):
        scheduler.submit(Item(0, 11))
    scheduler.close()


def test_closing_without_draining_fails_what_waits() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(items=1))
    scheduler.submit(Item(0, 1, 0))
    while scheduler.waiting:
        time.sleep(0.001)
    scheduler.submit(Item(1, 1, 1))
    threading.Timer(0.05, recorder.gate.set).start()
    scheduler.close(drain=False)
    assert recorder.results[0] == 0
    assert isinstance(recorder.results[1], SchedulerClosedError)
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(Item(2, 1, 2))


def test_a_passed_deadline_is_an_error_of_its_own() -> None:
    recorder = Recorder()
    scheduler = Scheduler(recorder.run, recorder.finish)
    scheduler.submit(Item(0, 1, 0, deadline=time.monotonic() - 1))
    scheduler.close()
    assert isinstance(recorder.results[0], DeadlineError)


def test_many_threads_submit_to_many_workers() -> None:
    recorder = Recorder()
    scheduler = Scheduler(recorder.run, recorder.finish, Limits(tokens=50, waiting=None), workers=3)

    def submit(first: int) -> None:
        for n in range(first, first + 200):
            scheduler.submit(Item(n, 1 + n % 7, n))

    threads = [threading.Thread(target=submit, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.close()
    assert recorder.results == {n: 2 * n for i in range(4) for n in range(1000 * i, 1000 * i + 200)}


@pytest.mark.parametrize("name", ["tokens", "items", "waiting", "latency"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be positive; got 0"):
        Limits(**{name: 0})


def test_time_that_another_batch_had_the_engine_is_not_counted_twice() -> None:
    turns, speed = Turns(), Speed()
    for start, end, own in ((0.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 3.0, 1.0), (7.0, 8.0, 1.0)):
        seconds = turns.seconds(start, end)
        assert seconds == own
        speed.add(100, end - start, seconds)
    assert speed.engine_seconds_per_token == pytest.approx(0.01)
    assert speed.seconds_per_token > 0.012
