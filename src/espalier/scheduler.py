"""Ragged batches under a budget of tokens: what waits is batched while the engine works on the batch before.

Nothing ever waits for a batch to fill: an idle engine takes what there is, and a batch is made up only when the engine
is free for it or it is full. The longer a batch takes, the more arrives meanwhile, so batches grow with the load up to
the budget, and the load decides between latency and throughput.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from espalier.errors import DeadlineError, InputError, InputShapeError, QueueFullError, SchedulerClosedError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``tokens`` and ``items`` of a batch at most; ``waiting`` items in the queue at most, None for no bound.

    ``delay``: nothing more is queued while what waits already takes that many seconds, None for no such bound.
    ``latency``: seconds from arrival to answer to keep most items within, None when only throughput counts. A batch is
    then never longer than a quarter of it, and items that cannot make it any more step back behind those that can.
    """

    tokens: int = 16384
    items: int = 1024
    waiting: int | None = 4096
    delay: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "items", "waiting", "delay", "latency"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be positive; got {value}")


class Item:
    """One sequence to run. ``tag`` is the caller's own; urgent items have a low ``priority``.

    ``deadline``: value of ``time.monotonic()`` after which the answer is useless, None for never. ``arrived`` and
    ``started`` are such values too: when it was queued, and when its batch began.
    """

    __slots__ = (
        "arrived", "deadline", "due", "model", "payload", "priority", "started", "tag", "tokens", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        payload: Any,
        tokens: int,
        tag: Any = None,
        *,
        model: Hashable = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.payload = payload
        self.tokens = tokens
        self.tag = tag
        self.model = model
        self.priority = priority
        self.deadline = deadline
        self.arrived = self.due = self.started = 0.0
        self.waiting = False


class Speed:
    """Seconds per token of past batches, the latest and the largest counting most; 0 before the first.

    ``seconds_per_token``: from a batch's start to its end, which says how late an answer will be.
    ``engine_seconds_per_token``: of the engine's time, which says how much it can do.
    """

    _KEPT = 0.9

    def __init__(self) -> None:
        self.seconds_per_token = self.engine_seconds_per_token = 0.0
        self._tokens = self._seconds = self._engine_seconds = 0.0

    def add(self, tokens: int, seconds: float, engine_seconds: float) -> None:
        """Learn from a batch."""
        self._tokens = self._KEPT * self._tokens + tokens
        self._seconds = self._KEPT * self._seconds + seconds
        self._engine_seconds = self._KEPT * self._engine_seconds + engine_seconds
        self.seconds_per_token = self._seconds / max(self._tokens, 1.0)
        self.engine_seconds_per_token = self._engine_seconds / max(self._tokens, 1.0)


class Turns:
    """How long each batch had the engine, when several workers begin batches and the engine runs one at a time.

    What a worker waits while another has the engine is the other's time: counted twice, a machine would look half as
    fast when it is busy as when it is not. Not safe for several threads.
    """

    def __init__(self) -> None:
        self._end = 0.0

    def seconds(self, start: float, end: float) -> float:
        """Of a batch begun at ``start`` and done now, at ``end``, that was not an earlier one's."""
        begin = max(start, self._end)
        self._end = end
        return end - begin


class Queue:
    """What waits, most urgent first. Not safe for several threads: the scheduler holds a lock around it."""

    _BATCH_SHARE = 0.25
    """Share of the latency bound a batch may take: what arrives as it begins still waits for it and runs itself."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.speed: dict[Hashable, Speed] = {}
        self._heaps: dict[Hashable, list[tuple[int, float, int, Item]]] = {}
        self._late: dict[Hashable, deque[Item]] = {}
        self._tokens: dict[Hashable, int] = {}
        self._count = 0
        self._serial = 0

    def __len__(self) -> int:
        return self._count

    @property
    def tokens(self) -> int:
        """Tokens of everything that waits."""
        return sum(self._tokens.values())

    @property
    def seconds(self) -> float:
        """How long what waits will take, by the speed of past batches."""
        return sum(count * self.speed[model].engine_seconds_per_token for model, count in self._tokens.items())

    @property
    def fills_batch(self) -> bool:
        """Whether a batch would gain nothing by waiting for more."""
        if self._count >= self.limits.items:
            return True
        return any(tokens >= self._budget(model) for model, tokens in self._tokens.items() if tokens)

    def push(self, item: Item, now: float) -> None:
        """Add an item that arrived ``now``."""
        item.arrived = now
        item.due = now + self.limits.latency if self.limits.latency is not None else now
        heap = self._heaps.get(item.model)
        if heap is None:
            heap = self._heaps[item.model] = []
            self._late[item.model] = deque()
            self._tokens[item.model] = 0
            self.speed[item.model] = Speed()
        self._serial += 1
        heappush(heap, (item.priority, item.due, self._serial, item))
        item.waiting = True
        self._count += 1
        self._tokens[item.model] += item.tokens

    def remove(self, item: Item) -> bool:
        """Take an item out before its turn. False when it does not wait (any more)."""
        if not item.waiting:
            return False
        self._left(item)
        item.payload = None  # its place in the heap is given up later
        return True

    def forget(self, model: Hashable) -> None:
        """Give up what is remembered of a model for which nothing waits."""
        if not self._tokens.get(model):
            for known in (self._heaps, self._late, self._tokens, self.speed):
                known.pop(model, None)

    def _left(self, item: Item) -> None:
        item.waiting = False
        self._count -= 1
        self._tokens[item.model] -= item.tokens

    def pop(self, now: float) -> tuple[list[Item], list[Item]]:
        """The next batch, of one model, and the items found whose deadline has passed. Empty when nothing waits."""
        batch: list[Item] = []
        expired: list[Item] = []
        while self._count and not batch:
            model = min((m for m in self._heaps if self._waits(m)), key=self._urgency)
            self._take(model, now, batch, expired)
        return batch, expired

    def _waits(self, model: Hashable) -> bool:
        return bool(self._heaps[model] or self._late[model])

    def _urgency(self, model: Hashable) -> tuple[bool, int, float]:
        heap = self._heaps[model]
        if heap:
            return False, heap[0][0], heap[0][1]
        return True, 0, self._late[model][0].due

    def _budget(self, model: Hashable) -> int:
        """Tokens of a batch, unless a single item has more."""
        budget, bound, rate = self.limits.tokens, self.limits.latency, self.speed[model].seconds_per_token
        return budget if bound is None or rate <= 0 else min(budget, int(bound * self._BATCH_SHARE / rate))

    def _take(self, model: Hashable, now: float, batch: list[Item], expired: list[Item]) -> None:
        heap, late, rate = self._heaps[model], self._late[model], self.speed[model].seconds_per_token
        budget, bound, total = self._budget(model), self.limits.latency, 0
        while len(batch) < self.limits.items and (heap or late):
            item = heap[0][3] if heap else late[0]
            if not item.waiting:
                pass  # removed meanwhile
            elif item.deadline is not None and item.deadline < now:
                expired.append(item)
            elif heap and bound is not None and now + item.tokens * rate > item.due:
                late.append(heappop(heap)[3])
                continue
            elif batch and total + item.tokens > budget:
                break
            else:
                batch.append(item)
                total += item.tokens
                item.started = now
            if item.waiting:
                self._left(item)
            if heap:
                heappop(heap)
            else:
                late.popleft()

    def drop(self) -> list[Item]:
        """Remove and return everything."""
        items = [entry[3] for heap in self._heaps.values() for entry in heap]
        items += [item for late in self._late.values() for item in late]
        items = [item for item in items if item.waiting]
        for item in items:
            self._left(item)
        self._heaps, self._late, self._tokens, self.speed = {}, {}, {}, {}
        return items


Run = Callable[[Hashable, list[Any]], Sequence[Any]]
"""Runs the payloads of a batch of one model and returns one result for each."""
Finish = Callable[[list[Item], Sequence[Any]], None]
"""Told the results of a batch; a result that is an exception says why that item has none."""


class Scheduler:
    """Threads that run batches. ``finish`` is called from them, so it should be quick.

    ``lanes``: batches that the engine works on at a time. With more ``workers`` than that one hands out results, or has
    a full batch at hand, while another has the engine. A batch that fails is run again item by item, so that only the
    items at fault fail.
    """

    def __init__(
        self, run: Run, finish: Finish, limits: Limits | None = None, *, workers: int = 1, lanes: int = 1
    ) -> None:
        self.limits = limits or Limits()
        self._lanes = lanes
        self._run = run
        self._finish = finish
        self._queue = Queue(self.limits)
        self._turns = Turns()
        lock = threading.Lock()
        self._wake = threading.Condition(lock)  # of workers
        self._calm = threading.Condition(lock)  # of those who wait for the end
        self._idle = 0
        self._running = 0  # batches that the engine has or is about to have
        self._busy = 0  # workers with a batch, in the engine or after it
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"espalier-scheduler-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, *items: Item) -> None:
        """Queue items; all of them or none.

        Raises QueueFullError, SchedulerClosedError, or InputShapeError for an item larger than any batch may be.
        """
        for item in items:
            if item.tokens > self.limits.tokens:
                raise InputShapeError(
                    f"a sequence of {item.tokens} tokens exceeds the budget of {self.limits.tokens} tokens a batch; "
                    "cut it, or raise the budget"
                )
        now = time.monotonic()
        with self._wake:
            if self._closing:
                raise SchedulerClosedError("the scheduler is closing and takes no more work; send it elsewhere")
            self._check_room(len(items))
            for item in items:
                self._queue.push(item, now)
            if self._idle and self._ready:
                self._wake.notify(min(self._idle, len(items)))

    def _check_room(self, count: int) -> None:
        bound, delay, seconds = self.limits.waiting, self.limits.delay, self._queue.seconds
        retry_after = max(0.05, seconds / 2)  # when about half of what waits will be done
        if bound is not None and len(self._queue) + count > bound:
            raise QueueFullError(
                f"{len(self._queue)} sequences wait already, and at most {bound} may; try again later", retry_after
            )
        if delay is not None and seconds > delay:
            raise QueueFullError(
                f"what waits already takes {seconds:.2f} s, and at most {delay:g} s of work may wait; try again later",
                retry_after,
            )

    def cancel(self, *items: Item) -> int:
        """Take out of the queue what nobody wants any more, and return how many items that were.

        ``finish`` does not hear of them. Items whose batch has begun, or is finished, stay as they are.
        """
        with self._wake:
            count = sum(self._queue.remove(item) for item in items)
            self._notice_calm()
            return count

    def tokens_per_second(self, model: Hashable) -> float | None:
        """A model's speed in past batches, None before the first."""
        speed = self._queue.speed.get(model)
        return 1 / speed.engine_seconds_per_token if speed is not None and speed.engine_seconds_per_token else None

    def forget(self, model: Hashable) -> None:
        """Drop what is remembered of a model's speed, when it is gone for good."""
        with self._wake:
            self._queue.forget(model)

    @property
    def waiting(self) -> int:
        """Items in the queue, without those being run."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Their tokens."""
        with self._wake:
            return self._queue.tokens

    def drain(self) -> None:
        """Wait until everything submitted is finished."""
        with self._calm:
            self._calm.wait_for(lambda: not len(self._queue) and not self._busy)

    def close(self, *, drain: bool = True) -> None:
        """Take no more work, finish what waits (or, without ``drain``, fail it), and end the threads."""
        with self._wake:
            self._closing = True
            dropped = [] if drain else self._queue.drop()
            self._wake.notify_all()
        if dropped:
            self._finish(dropped, [SchedulerClosedError("the scheduler was closed before its turn") for _ in dropped])
        for thread in self._threads:
            thread.join()

    @property
    def _ready(self) -> bool:
        """Whether a batch should be made up now."""
        return len(self._queue) > 0 and (self._running < self._lanes or self._queue.fills_batch)

    def _notice_calm(self) -> None:
        if not self._busy and not len(self._queue):
            self._calm.notify_all()

    def _next(self) -> tuple[list[Item], list[Item]] | None:
        """Wait for a batch; None when there will be no more."""
        with self._wake:
            while not self._ready:
                if self._closing and not len(self._queue):
                    return None
                self._idle += 1
                self._wake.wait()
                self._idle -= 1
            taken = self._queue.pop(time.monotonic())
            self._busy += 1
            self._running += 1
            return taken

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            batch, expired = taken
            try:
                try:
                    if expired:
                        self._finish(expired, [DeadlineError("the deadline passed before its turn") for _ in expired])
                    results = self._results(batch) if batch else ()
                finally:
                    self._leave_engine()
                if batch:
                    self._finish(batch, results)
            finally:
                with self._wake:
                    self._busy -= 1
                    self._notice_calm()

    def _leave_engine(self) -> None:
        with self._wake:
            self._running -= 1
            if self._closing:
                self._wake.notify_all()
            elif self._idle and self._ready:
                self._wake.notify()

    def _results(self, batch: list[Item]) -> Sequence[Any]:
        model = batch[0].model
        start = time.monotonic()
        try:
            results = self._run(model, [item.payload for item in batch])
        except Exception as error:  # noqa: BLE001 - whatever the engine raises belongs to its items
            return [error] if len(batch) == 1 else [self._results([item])[0] for item in batch]
        with self._wake:
            end = time.monotonic()
            engine_seconds = self._turns.seconds(start, end)
            speed = self._queue.speed.get(model)
            if speed is not None:
                speed.add(sum(item.tokens for item in batch), end - start, engine_seconds)
        return results
