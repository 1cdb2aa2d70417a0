"""Which format and kernel each weight gets: the cost model's choice, or the fastest of its candidates by measurement.

Measurements are kept per machine in the user's cache folder, so that a model is tuned once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.cache import MachineCache, cache_folder

if TYPE_CHECKING:
    from espalier._native import Matrix8, SparseMatrix, Weight, Weight8

CACHE_VERSION = 3
_WORTH_MEASURING = 1.8
"""Candidates whose estimate exceeds the best one's by this factor are not measured."""
_MOST_MEASURED = 4


@dataclass(frozen=True)
class Candidate:
    """A format that a weight may take: its chunk of columns (0 where a format has none), the estimated cycles of a full
    panel, and what packs the weight."""

    format: str
    chunk: int
    cycles: float
    pack: Callable[[], Weight | Weight8]


@dataclass(frozen=True)
class Choice:
    """A packed weight, its format (``dense``, ``unstructured``, ``4x1``, ``dense8`` or ``1x4x8``) and chunk."""

    format: str
    chunk: int
    measured: bool
    weight: Weight | Weight8 = field(compare=False)


def float_candidates(matrix: SparseMatrix, isa: str) -> list[Candidate]:
    """The formats of a float32 weight, cheapest first."""
    from espalier import _native

    def pack(name: str, chunk: int) -> Callable[[], Weight]:
        return lambda: _native.Weight(matrix, name, chunk, isa)

    return [Candidate(name, chunk, cycles, pack(name, chunk)) for name, chunk, cycles in matrix.candidates(isa)]


def integer_candidates(matrix: Matrix8, isa: str) -> list[Candidate]:
    """The formats of an integer weight, cheapest first."""
    from espalier import _native

    def pack(name: str) -> Callable[[], Weight8]:
        return lambda: _native.Weight8(matrix, name, isa)

    return [Candidate(name, 0, cycles, pack(name)) for name, cycles in matrix.candidates(isa)]


def weight_key(kind: str, rows: int, columns: int, *counts: int) -> str:
    """Names weights that perform alike: the same shape, and ``counts`` (nonzeros, blocks) to within a few per cent."""
    bins = (round(math.log(count + 1) / math.log(1.04)) for count in counts)
    return "/".join([f"{kind}{rows}x{columns}", *map(str, bins)])


class Tuner:
    """Chooses formats for one instruction set; ``tune=False`` trusts the cost model."""

    def __init__(self, isa: str, *, tune: bool, cache: Path | None = None) -> None:
        self.isa = isa
        self.tune = tune
        self._cache = MachineCache(cache or cache_folder() / "tuning.json", CACHE_VERSION, isa) if tune else None
        self._changed = False

    def choose(self, key: str, ranked: Sequence[Candidate]) -> Choice:
        """One of ``ranked``, which is ordered by estimate. With tuning, the measured fastest of the promising ones.

        They are measured once for all weights of the same ``key``.
        """
        if self._cache is None:
            best = ranked[0]
            return Choice(best.format, best.chunk, False, best.pack())
        known = self._cache.known.get(key)
        for candidate in ranked:
            if known == [candidate.format, candidate.chunk]:
                return Choice(candidate.format, candidate.chunk, True, candidate.pack())
        choice = self._measure(ranked)
        self._cache.known[key] = [choice.format, choice.chunk]
        self._changed = True
        return choice

    def save(self) -> None:
        """Write new measurements to the cache."""
        if self._cache is not None and self._changed:
            self._cache.save()

    def _measure(self, ranked: Sequence[Candidate]) -> Choice:
        limit = ranked[0].cycles * _WORTH_MEASURING
        worthwhile = [candidate for candidate in ranked if candidate.cycles <= limit][:_MOST_MEASURED]
        weights = [candidate.pack() for candidate in worthwhile]
        best = [math.inf] * len(weights)
        for _ in range(2):  # in turn, so that a drift of the clock hits all alike
            for index, weight in enumerate(weights):
                best[index] = min(best[index], weight.time(self.isa))
        fastest = best.index(min(best))
        return Choice(worthwhile[fastest].format, worthwhile[fastest].chunk, True, weights[fastest])
