"""Lanes: streams with buffers and captured graphs of their own, so that one batch travels while another is computed.

A batch takes a free lane, is copied to the device, computed by the lane's graph for its bucket, and copied back, all
enqueued at once; nothing waits until somebody asks for the result. A single caller with many batches keeps all lanes
busy, which double-buffers the transfers; several callers share them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")


class Recent(Generic[K, T]):
    """At most ``capacity`` things by key; the one used longest ago goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: OrderedDict[K, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K, make: Callable[[], T]) -> T:
        """The thing of that key, made when there is none."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        if len(self._items) >= self._capacity:
            self._items.popitem(last=False)
        item = self._items[key] = make()
        return item


class Pending(Generic[R]):
    """A result on its way. ``finish`` waits for it and reads it; the lane is then free again."""

    def __init__(self, finish: Callable[[], R], release: Callable[[], None]) -> None:
        self._finish = finish
        self._release = release

    def result(self) -> R:
        """Wait. To be called once."""
        try:
            return self._finish()
        finally:
            self._release()


class Lanes(Generic[T, R]):
    """``count`` lanes, each with the state that ``make`` gives it.

    ``enqueue(state, work)`` starts ``work`` and returns what waits for its result. One thread at a time calls it.
    """

    def __init__(self, count: int, make: Callable[[], T], enqueue: Callable[[T, Any], Callable[[], R]]) -> None:
        self._free: SimpleQueue[T] = SimpleQueue()
        for _ in range(count):
            self._free.put(make())
        self._enqueue = enqueue
        self._lock = threading.Lock()

    def run_all(self, works: Iterable[Any]) -> Iterator[R]:
        """The results of ``works`` in order, as many under way at a time as there are free lanes."""
        pending: deque[Pending[R]] = deque()
        try:
            for work in works:
                lane = self._take(wait=not pending)
                while lane is None:
                    # Whoever waits holds no lane: two callers with one each could wait for each other for ever.
                    yield pending.popleft().result()
                    lane = self._take(wait=not pending)
                pending.append(self._start(lane, work))
            while pending:
                yield pending.popleft().result()
        finally:
            # Every lane must come free again; what went wrong first is what the caller hears.
            while pending:
                with suppress(Exception):
                    pending.popleft().result()

    def _take(self, *, wait: bool) -> T | None:
        try:
            return self._free.get(block=wait)
        except Empty:
            return None

    def _start(self, lane: T, work: Any) -> Pending[R]:
        def release() -> None:
            self._free.put(lane)

        try:
            with self._lock:
                finish = self._enqueue(lane, work)
        except BaseException:
            release()
            raise
        return Pending(finish, release)
