"""Between the protocols, which live on one event loop, and the scheduler's threads.

A request becomes items of the scheduler: one per sequence where the model takes sequences apart, else one for the
whole request. Its future resolves when the last item is done; cancelling the future takes what still waits out of the
queue.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from espalier._session.checks import choose_outputs
from espalier.data import Feature
from espalier.errors import EspalierError, InputShapeError
from espalier.pipelines import Pipeline
from espalier.scheduler import Item, Limits, Scheduler
from espalier.serve.metrics import Metrics
from espalier.serve.models import Model

_WORKERS = 2  # one hands out results while the other has the engine
_MASKS = ("attention_mask", "input_mask")
_TEACHING_TOKENS, _TEACHING_ROWS, _TEACHING_ROUNDS = 128, 4, 2


@dataclass(frozen=True)
class Options:
    """``priority``: low is urgent. ``timeout``: seconds until the answer is useless, None for never."""

    priority: int = 0
    timeout: float | None = None


@dataclass(frozen=True)
class _Row:
    """One sequence: inputs without the batch axis, and the outputs wanted."""

    feeds: Mapping[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Whole:
    """Inputs to run as they are."""

    feeds: Mapping[str, Any]
    outputs: tuple[str, ...]


@dataclass
class _Work:
    """A request under way: results by item, as they come."""

    future: asyncio.Future[list[Any]]
    results: list[Any]
    left: int
    items: list[Item] = field(default_factory=list)


class Dispatcher:
    """Runs requests of any number of models on one scheduler. Use it from one event loop, after :meth:`start`."""

    def __init__(self, limits: Limits, metrics: Metrics, *, lanes: int = 1) -> None:
        """``lanes``: batches that a model works on at a time."""
        self.limits = limits
        self.metrics = metrics
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduler = Scheduler(_run, self._finish, limits, workers=_WORKERS, lanes=lanes)

    def start(self) -> None:
        """Take the running event loop as the one that gets results."""
        self._loop = asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self._scheduler.waiting

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._scheduler.waiting_tokens

    async def infer(
        self, model: Model, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None, options: Options
    ) -> dict[str, np.ndarray]:
        """The outputs named, all for None, of inputs as :meth:`Session.run` takes them.

        Raises what that raises, QueueFullError, DeadlineError or SchedulerClosedError.
        """
        names = tuple(choose_outputs(outputs, model.output_names))
        if not model.session.check(feeds):
            tokens = max((math.prod(np.shape(array)[:2]) for array in feeds.values()), default=1)
            (arrays,) = await self._submit(model, [(_Whole(feeds, names), tokens)], options)
            return dict(zip(names, arrays, strict=True))
        rows = [
            (_Row({name: array[i] for name, array in feeds.items()}, names), tokens)
            for i, tokens in enumerate(_row_tokens(feeds))
        ]
        found = await self._submit(model, rows, options)
        return {name: _stacked([arrays[k] for arrays in found]) for k, name in enumerate(names)}

    async def run_features(
        self, model: Model, pipeline: Pipeline, features: Sequence[Feature], options: Options
    ) -> list[np.ndarray]:
        """The task's array for each feature. Raises as :meth:`infer`."""
        outputs = tuple(pipeline.outputs)
        rows = [(_Row(pipeline.row(feature), outputs), len(feature.ids)) for feature in features]
        return [pipeline.result(arrays) for arrays in await self._submit(model, rows, options)]

    async def learn(self, model: Model) -> None:
        """Run a little, so that the model is warm and the scheduler knows its speed before the first request."""
        feeds = {info.name: np.ones(_TEACHING_TOKENS, np.int64) for info in model.inputs[:1]}
        rows = [(_Row(feeds, model.output_names), _TEACHING_TOKENS)] * _TEACHING_ROWS
        for _ in range(_TEACHING_ROUNDS):
            try:
                await self._submit(model, rows, Options())
            except EspalierError:
                return  # it does not take sequences of tokens; the first requests will tell

    def tokens_per_second(self, model: Model) -> float | None:
        """The model's speed in past batches, None before the first."""
        return self._scheduler.tokens_per_second(model)

    def forget(self, model: Model) -> None:
        """A model is gone for good."""
        self._scheduler.forget(model)

    async def close(self) -> None:
        """Take no more work, and fail what still waits."""
        await asyncio.to_thread(lambda: self._scheduler.close(drain=False))

    def _submit(
        self, model: Model, payloads: Sequence[tuple[_Row | _Whole, int]], options: Options
    ) -> asyncio.Future[list[Any]]:
        if self._loop is None:
            raise RuntimeError("Dispatcher.start has not been called")
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if not payloads:
            future.set_result([])
            return future
        if self.limits.waiting is not None and len(payloads) > self.limits.waiting:
            raise InputShapeError(
                f"a request of {len(payloads)} sequences can never be queued: at most {self.limits.waiting} may wait; "
                "send it in parts"
            )
        work = _Work(future, [None] * len(payloads), len(payloads))
        deadline = None if options.timeout is None else time.monotonic() + options.timeout
        work.items = [
            Item(payload, tokens, (work, i), model=model, priority=options.priority, deadline=deadline)
            for i, (payload, tokens) in enumerate(payloads)
        ]
        self._scheduler.submit(*work.items)
        future.add_done_callback(lambda _: self._abandon(work))
        return future

    def _abandon(self, work: _Work) -> None:
        """Called when a request is over; where items of it still wait, its client has left or another item failed."""
        if work.left:
            self.metrics.cancelled.inc(self._scheduler.cancel(*work.items))
        work.items.clear()  # items know their work, and a cycle would live on for a while

    def _measure(self, items: Sequence[Item], now: float) -> None:
        model: Any = items[0].model
        batches, tokens = self.metrics.batches(model.name), sum(item.tokens for item in items)
        self.metrics.compute.observe(now - items[0].started)
        batches.sequences.observe(len(items))
        batches.tokens.observe(tokens)
        batches.total.inc(tokens)
        for item in items:
            self.metrics.queue.observe(item.started - item.arrived)

    def _finish(self, items: list[Item], results: Sequence[Any]) -> None:
        """The scheduler's callback, in its threads."""
        now = time.monotonic()
        done: list[_Work] = []
        with self._lock:
            for item, result in zip(items, results, strict=True):
                work, place = item.tag
                work.results[place] = result
                work.left -= 1
                if not work.left or isinstance(result, Exception):
                    done.append(work)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._resolve, done, items, now)

    def _resolve(self, done: Sequence[_Work], items: Sequence[Item], now: float) -> None:
        """On the event loop: answer, and measure once the answers are out, which this thread keeps nobody from."""
        for work in done:
            if work.future.done():
                continue
            error = next((result for result in work.results if isinstance(result, Exception)), None)
            if error is not None:
                work.future.set_exception(error)
            else:
                work.future.set_result(work.results)
        if items[0].started:  # else their deadlines passed
            asyncio.get_running_loop().call_soon(self._measure, items, now)


def _run(model: Any, payloads: list[Any]) -> list[Any]:
    """The scheduler's other callback: one batch of one model."""
    results: list[Any] = [None] * len(payloads)
    rows = {i: payload for i, payload in enumerate(payloads) if isinstance(payload, _Row)}
    if rows:
        results = _run_rows(model, rows, results)
    for i, payload in enumerate(payloads):
        if isinstance(payload, _Whole):
            try:
                results[i] = model.session.run(list(payload.outputs), payload.feeds)
            except EspalierError as error:
                results[i] = error
    return results


def _run_rows(model: Model, rows: Mapping[int, _Row], results: list[Any]) -> list[Any]:
    wanted = {name for row in rows.values() for name in row.outputs}
    names = [name for name in model.output_names if name in wanted]
    found = dict(zip(names, model.session.run_ragged(names, [row.feeds for row in rows.values()]), strict=True))
    for place, (i, row) in enumerate(rows.items()):
        results[i] = [found[name][place] for name in row.outputs]
    return results


def _row_tokens(feeds: Mapping[str, np.ndarray]) -> list[int]:
    """Tokens of each row that will really be computed."""
    mask = next((feeds[name] for name in _MASKS if name in feeds and feeds[name].ndim == 2), None)
    if mask is None:
        first = next(iter(feeds.values()))
        return [first.shape[1]] * first.shape[0]
    return [max(1, count) for count in np.count_nonzero(mask, axis=1).tolist()]


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
