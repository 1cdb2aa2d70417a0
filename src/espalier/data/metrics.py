"""Figures of merit with bootstrap intervals (Efron 1979, percentile method)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from espalier.errors import InputError

ROUNDS = 1000
SEED = 0
LEVEL = 95
"""Per cent of the bootstrap distribution that an interval covers."""


@dataclass(frozen=True)
class Interval:
    """``low`` to ``high`` covers :data:`LEVEL` per cent."""

    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """An evaluation that can be repeated on resampled examples.

    ``statistic`` takes indices of examples (int64 ``[n]``) and returns the figure; ``details`` are other figures.
    """

    name: str
    count: int
    statistic: Callable[[np.ndarray], float]
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The figure on all examples."""
        return self.statistic(np.arange(self.count))

    def metric(self, *, rounds: int = ROUNDS, seed: int = SEED) -> Metric:
        """The figure with its interval. The same seed draws the same examples for every model."""
        samples = np.array([self.statistic(drawn) for drawn in _draws(self.count, rounds, seed)])
        found = _percentiles(samples)
        return Metric(self.name, self.value, found.low, found.high, self.count, dict(self.details))


@dataclass(frozen=True)
class Metric:
    """A figure on ``count`` held-out examples with its bootstrap interval."""

    name: str
    value: float
    low: float
    high: float
    count: int
    details: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        extra = "".join(f", {name} {value:.4f}" for name, value in self.details.items())
        return f"{self.name} {self.value:.4f} ({LEVEL} % {self.low:.4f}-{self.high:.4f}) on {self.count}{extra}"


def recovery_interval(sparse: Scores, dense: Scores, *, rounds: int = ROUNDS, seed: int = SEED) -> Interval:
    """Interval of the ratio sparse / dense, both resampled with the same examples.

    Raises InputError when the two were not evaluated on equally many examples.
    """
    if sparse.count != dense.count:
        raise InputError(f"expected two evaluations of the same examples, got {sparse.count} and {dense.count} of them")
    ratios = [
        sparse.statistic(drawn) / base
        for drawn in _draws(sparse.count, rounds, seed)
        if (base := dense.statistic(drawn)) != 0
    ]
    return _percentiles(np.array(ratios)) if ratios else Interval(float("nan"), float("nan"))


def mean_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    """The mean of ``values`` ``[n]`` as a statistic."""
    return lambda drawn: float(values[drawn].mean())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two ``[n]``, ties at their mean rank; NaN when one of them is constant."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    ranks_a -= ranks_a.mean()
    ranks_b -= ranks_b.mean()
    scale = np.sqrt((ranks_a**2).sum() * (ranks_b**2).sum())
    return float((ranks_a * ranks_b).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts - 1) / 2)[group]
    return ranks


def _draws(count: int, rounds: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, count, count) for _ in range(rounds)]


def _percentiles(samples: np.ndarray) -> Interval:
    tail = (100 - LEVEL) / 2
    good = samples[np.isfinite(samples)]
    if good.size == 0:
        return Interval(float("nan"), float("nan"))
    return Interval(float(np.percentile(good, tail)), float(np.percentile(good, 100 - tail)))
