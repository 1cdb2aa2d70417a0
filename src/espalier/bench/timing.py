"""Timing several callables in turn, so that a machine that drifts drifts for all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from espalier.errors import InputError

SETTLE = 0.05
"""Seconds of rest before each call: thread pools spin for a while after a run, and would take the next one's cores."""


@dataclass(frozen=True)
class Timing:
    """Seconds of every call of one candidate, in the order they were made; warm-up calls are not among them."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """Seconds that ``q`` per cent of the calls stayed under (linear interpolation)."""
        return float(np.percentile(self.seconds, q))

    @property
    def p50(self) -> float:
        """The median, in seconds."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """Seconds that nine calls in ten stayed under."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """Seconds that 99 calls in 100 stayed under; with few rounds, nearly the slowest call."""
        return self.percentile(99)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    settle: float = SETTLE,
    on_round: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time each candidate ``rounds`` times, taking turns; ``warmup`` untimed turns come first.
    Before every timed call come ``settle`` seconds of rest.

    Every other round runs backwards, so that no candidate always follows the same one and inherits the caches it
    leaves. ``on_round`` is told how many rounds are done. Raises InputError when there is nothing to time.
    """
    if not candidates:
        raise InputError("nothing to time: give at least one candidate")
    if rounds < 1 or warmup < 0:
        raise InputError(f"rounds must be at least 1 and warmup at least 0; got {rounds} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup):
        for call in candidates.values():
            call()
    forwards = list(candidates.items())
    for index in range(rounds):
        for name, call in forwards if index % 2 == 0 else reversed(forwards):
            sleep(settle)
            start = clock()
            call()
            seconds[name].append(clock() - start)
        if on_round is not None:
            on_round(index + 1)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
