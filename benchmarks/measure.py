"""Outputs first, then time: one case on several engines, taking turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
from cases import MINILM, Arrays, Case, Work, restore, work

TOLERANCE = 2e-4
"""Largest difference from ONNX Runtime on the same model, relative to the larger of 1 and the largest output."""
TOLERANCE_INT8 = 0.15
"""For quantised models: root mean square of the differences over that of the outputs. Sums that differ in their last
bit round to neighbouring integers, and twelve layers of random weights make much of it: ONNX Runtime with and without
its optimisations differs from itself by 0.02 to 0.03, and from the float32 model by 0.08. A wrong scale is off by 1."""
SETTLE = 0.05
"""Seconds between turns: some engines' threads spin for a while after a call, on cores that the next one needs."""
TURN = 0.3
"""Seconds a turn aims at: a short call is repeated, so that its median is of warm caches."""


class Timed(Protocol):
    """What `worker.Engine` and `remote.Remote` have in common."""

    def load(self, model: str, shape: tuple[int, int] | None, threads: int, options: dict[str, Any]) -> float: ...
    def set_calls(self, calls: list[list[Arrays]], ragged: bool) -> None: ...
    def outputs(self) -> list[list[Arrays]]: ...
    def time(self, call: int, times: int) -> list[float]: ...


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an engine's outputs are from ONNX Runtime's on the same model, over every valid token."""

    relative: float
    embeddings: float | None = None
    """Largest absolute difference of mean-pooled, normalised embeddings, for embedding models."""
    tolerance: float = TOLERANCE

    @property
    def good(self) -> bool:
        return self.relative <= self.tolerance


def compare(case: Case, reference: list[Arrays], found: list[Arrays]) -> Agreement:
    """Raises ValueError when the outputs cannot be compared: another count, no common name, another shape."""
    if len(reference) != len(found):
        raise ValueError(f"{len(found)} sequences came back, {len(reference)} went in")
    if case.model == MINILM:
        want, got = (np.stack([_embedding(one) for one in side]) for side in (reference, found))
        worst = float(np.abs(want - got).max())
        common = set(reference[0]) & set(found[0])
        return Agreement(relative=_relative(reference, found, common) if common else worst, embeddings=worst)
    if set(reference[0]) - set(found[0]):
        raise ValueError(f"outputs {sorted(found[0])}, expected {sorted(reference[0])}")
    if "int8" in case.model:
        return Agreement(relative=_root_mean_square(reference, found), tolerance=TOLERANCE_INT8)
    return Agreement(relative=_relative(reference, found, set(reference[0])))


def _root_mean_square(reference: list[Arrays], found: list[Arrays]) -> float:
    wanted, got = (
        np.concatenate([one[name].ravel() for one in side for name in reference[0]]) for side in (reference, found)
    )
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def _relative(reference: list[Arrays], found: list[Arrays], names: set[str]) -> float:
    worst = 0.0
    for name in names:
        scale = max(1.0, max(float(np.abs(one[name]).max()) for one in reference))
        for want, got in zip(reference, found, strict=True):
            if want[name].shape != got[name].shape:
                raise ValueError(f"output {name!r} is {got[name].shape}, expected {want[name].shape}")
            difference = float(np.abs(want[name] - got[name]).max()) / scale
            # A NaN must not pass: it compares as neither smaller nor larger.
            worst = difference if math.isnan(difference) or difference > worst else worst
            if math.isnan(worst):
                return worst
    return worst


def _embedding(outputs: Arrays) -> Any:
    """The model's own pooled vector where it gives one, else the mean of the tokens, normalised."""
    pooled = [array for array in outputs.values() if array.ndim == 1]
    vector = pooled[0] if pooled else outputs["last_hidden_state"].mean(axis=0)
    return vector / np.linalg.norm(vector)


def check(case: Case, given: Work, engine: Timed, reference: list[Arrays]) -> Agreement:
    """Hand `engine` its calls, run each once and compare; leaves the engine ready to be timed."""
    engine.set_calls(given.calls, given.ragged)
    return compare(case, reference, restore(case, given, engine.outputs()))


def reference_outputs(case: Case, oracle: Timed, model: str, threads: int) -> list[Arrays]:
    """ONNX Runtime's answers on the very model the engines get; unpadded and one at a time for ragged cases.

    Its sums of integers are made exact: by default they saturate on x86 processors without VNNI.
    """
    oracle.load(model, None, threads, {"session.x64quantprecision": "1"})
    given = work(case, "onnxruntime")
    if case.ragged:
        alone = [[{name: array[None] for name, array in one.items()}] for one in case.sequences()]
        given = Work(calls=alone, order=given.order)
    oracle.set_calls(given.calls, False)
    return restore(case, given, oracle.outputs())


def interleave(
    engines: Mapping[str, Timed], calls: Mapping[str, int], *, rounds: int, tick: Callable[[], None]
) -> dict[str, list[list[float]]]:
    """Seconds of every timed run, by engine and call.

    One untimed turn each first, which also tells how often a short call is repeated within a turn. Then `rounds`
    rounds; in each, the engines take turns call by call, every other round in the opposite order. `tick` is called once
    a round.
    """
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(calls[name])] for name in engines}
    repeats: dict[str, int] = {}
    for name, engine in engines.items():
        estimate = engine.time(0, 1)[0]
        repeats[name] = max(1, min(20, round(TURN / max(estimate, 1e-6))))
    for number in range(rounds):
        names = list(engines) if number % 2 == 0 else list(reversed(list(engines)))
        # Row i holds every engine's call i: engines that need fewer calls for the same work sit out the last rows.
        for turns in zip_longest(*([(name, i) for i in range(calls[name])] for name in names)):
            for turn in turns:
                if turn is not None:
                    name, call = turn
                    time.sleep(SETTLE)
                    seconds[name][call] += engines[name].time(call, repeats[name])
        tick()
    return seconds


def summary(case: Case, given: Work, seconds: list[list[float]], agreement: Agreement | None) -> dict[str, Any]:
    """One engine's entry in a row: the case's whole work takes the sum over its calls of each call's median."""
    total = sum(float(np.median(times)) for times in seconds)
    spread = [sum(float(np.percentile(times, q)) for times in seconds) for q in (10, 90)]
    entry: dict[str, Any] = {
        "median_ms": round(total * 1e3, 3),
        "p10_ms": round(spread[0] * 1e3, 3),
        "p90_ms": round(spread[1] * 1e3, 3),
        "samples_per_s": round(len(case.lengths) / total, 3),
        "tokens_per_s": round(sum(case.lengths) / total, 1),
        "runs": sum(map(len, seconds)),
        "input": given.how,
    }
    if agreement is not None:
        entry["relative_error"] = float(f"{agreement.relative:.3g}")
        if agreement.embeddings is not None:
            entry["embedding_error"] = float(f"{agreement.embeddings:.3g}")
    return entry
