"""The system under test: between LoadGen's callbacks and an engine.

Nothing is cached, and nothing depends on which sample a query asks for beyond that sample's own content and length.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.mlperf.engines import Engine
from espalier.mlperf.features import Samples
from espalier.scheduler import Item, Limits, Scheduler

MOST_RECORDS = 4_000_000
"""Queries whose times are kept: enough for any real engine; only the empty one has more."""


_NOTHING = np.zeros(0, np.float32)


class SystemUnderTest(ABC):
    """Answers queries. ``failures`` says what went wrong with samples; they are answered with nothing."""

    def __init__(self, samples: Samples, loadgen: Any) -> None:
        self.failures: list[str] = []
        self._samples = samples
        self._response = loadgen.QuerySampleResponse
        self._complete = loadgen.QuerySamplesComplete
        self._issued = array("d")
        self._done = array("d")

    @abstractmethod
    def issue(self, ids: list[int], indices: list[int]) -> None:
        """LoadGen's callback: run the samples ``indices`` and answer each under its id."""

    @abstractmethod
    def close(self) -> None:
        """End the threads, when everything is answered."""

    def construct(self, loadgen: Any) -> Any:
        """Make it known to LoadGen; returns LoadGen's handle."""
        return loadgen.ConstructFastSUT(self.issue, self.flush)

    def destroy(self, loadgen: Any, handle: Any) -> None:
        """The opposite of :meth:`construct`."""
        loadgen.DestroyFastSUT(handle)

    def flush(self) -> None:
        """LoadGen's other callback: no more queries for now."""
        return  # nothing is ever held back here

    def times(self) -> np.ndarray:
        """float64 ``[queries, 2]``: seconds at which queries came and were answered, in order of the answers."""
        return np.stack([np.frombuffer(self._issued), np.frombuffer(self._done)], axis=1)

    def _answer(self, ids: Sequence[int], answers: Sequence[Any], issued: Sequence[float]) -> None:
        """Hand answers to LoadGen, which copies what it keeps of them before this returns."""
        self.failures += [f"{type(a).__name__}: {a}" for a in answers if isinstance(a, Exception)]
        arrays = [_NOTHING if isinstance(a, Exception) else a.ravel() for a in answers]
        # One block, because asking every array for its address costs more than copying it.
        block = np.concatenate(arrays)
        sizes = [a.nbytes for a in arrays]
        places = itertools.accumulate(sizes, initial=block.ctypes.data)
        self._complete(list(map(self._response, ids, places, sizes)))
        if len(self._done) < MOST_RECORDS:
            self._done.extend([time.perf_counter()] * len(issued))
            self._issued.extend(issued)


class Direct(SystemUnderTest):
    """Runs each query at once in LoadGen's thread, all its samples together: there is never more than one."""

    def __init__(self, engine: Engine, samples: Samples, loadgen: Any) -> None:
        super().__init__(samples, loadgen)
        self._engine = engine

    def issue(self, ids: list[int], indices: list[int]) -> None:
        start = time.perf_counter()
        features = [self._samples[i] for i in indices]
        try:
            answers: Sequence[Any] = self._engine.run(features)
        except Exception as error:  # noqa: BLE001 - an exception in a callback would end the process
            answers = [error] * len(ids)
        self._answer(ids, answers, [start])

    def close(self) -> None:
        return  # there are no threads


class Scheduled(SystemUnderTest):
    """Queues queries and runs what waits in batches; see :mod:`espalier.scheduler`."""

    def __init__(
        self,
        engine: Engine,
        samples: Samples,
        loadgen: Any,
        *,
        limits: Limits,
        by_length: bool = False,
    ) -> None:
        """``by_length`` puts the samples of one query in order of their lengths, for engines that pad."""
        super().__init__(samples, loadgen)
        self._by_length = by_length
        self._lock = threading.Lock()
        self._lengths = samples.lengths.tolist()
        self._scheduler = Scheduler(
            lambda _, batch: engine.run(batch),
            self._finish,
            limits,
            workers=engine.workers,
            lanes=engine.settings.load.lanes,
        )

    def issue(self, ids: list[int], indices: list[int]) -> None:
        now = time.perf_counter()
        samples, lengths = self._samples, self._lengths
        items = [Item(samples[i], lengths[i], (number, now)) for number, i in zip(ids, indices, strict=True)]
        if self._by_length:
            items.sort(key=lambda item: item.tokens)
        self._scheduler.submit(*items)

    def close(self) -> None:
        self._scheduler.close()

    def _finish(self, items: list[Item], results: Sequence[Any]) -> None:
        with self._lock:
            self._answer([item.tag[0] for item in items], results, [item.tag[1] for item in items])
