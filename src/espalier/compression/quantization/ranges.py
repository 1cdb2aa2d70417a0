"""From what a layer gets to the range that 8 bits are spread over.

minmax: everything that was seen. percentile: all but a share of the values. mse: the range with the least squared
error of the values. entropy: the one whose 256 levels keep most of the distribution (Kullback-Leibler divergence, as
TensorRT's calibrator, Migacz 2017). The last three cut off rare large values for the sake of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.compression.quantization.linear import HIGH, LOW, round_static

_VALUES = 1 << 20
"""Numbers of a layer's inputs that are kept for comparisons."""
_BINS = 1 << 14
_SHARES = np.linspace(1.0, 0.2, 41)
_TINY = 1e-12


@dataclass
class Inputs:
    """What a layer got: the range and a histogram of all values, and tokens drawn at random. ``batches``: how many will
    come; ``counts``: of equal bins from ``-reach`` to ``reach``.

    Ranges follow from all values and not from the tokens drawn: a few tokens may hold most of a layer's outputs.
    """

    features: int
    batches: int
    low: float = 0.0
    high: float = 0.0
    tokens: int = 0
    reach: float = 2.0**-126
    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS))
    kept: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Inputs ``[tokens, features]``, float32 and finite."""
        if not x.numel():
            return
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self._count(x.detach().cpu())
        self.tokens += len(x)
        wanted = max(1, _VALUES // self.features // self.batches)
        # At random: any regular choice may always meet the same places of sequences, and miss [SEP].
        generator = torch.Generator().manual_seed(len(self.kept))
        self.kept.append(x[torch.randperm(len(x), generator=generator)[:wanted].to(x.device)])

    @property
    def sample(self) -> Tensor:
        """float32 ``[tokens, features]``."""
        return torch.cat(self.kept)

    @property
    def middles(self) -> np.ndarray:
        """The values that the histogram's ``counts`` are of, float64 ``[bins]``."""
        return (np.arange(_BINS) + 0.5) / _BINS * 2 * self.reach - self.reach

    def _count(self, x: Tensor) -> None:
        while self.reach < max(-self.low, self.high):  # twice as wide: pairs of bins become one, in the middle half
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), _BINS // 4)
            self.reach *= 2
        # In float64, which holds the ends of any range of float32.
        self.counts += torch.histc(x.double(), _BINS, -self.reach, self.reach).numpy()


def parameters(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Scale float32 ``[1]`` and zero point int8 ``[1]`` of a range that holds 0; a scale of 1 where it is empty."""
    scale = np.float32((high - low) / (HIGH - LOW))
    if scale < np.finfo(np.float32).tiny:
        return torch.ones(1), torch.zeros(1, dtype=torch.int8)
    zero = np.clip(np.rint(LOW - np.float32(low) / scale), LOW, HIGH)
    return torch.tensor([scale]), torch.tensor([int(zero)], dtype=torch.int8)


def range_of(method: str, inputs: Inputs, percentile: float) -> tuple[float, float]:
    """The range, which holds 0, that a method chooses; ``percentile`` is for the method of that name, 50 to 100."""
    if method == "minmax" or inputs.low == inputs.high:
        return inputs.low, inputs.high
    if method == "percentile":
        share = np.cumsum(inputs.counts) / inputs.counts.sum() * 100
        low, high = inputs.middles[np.searchsorted(share, [100 - percentile, percentile]).clip(0, _BINS - 1)]
        return max(inputs.low, min(0.0, float(low))), min(inputs.high, max(0.0, float(high)))
    error = {"mse": _squared_error, "entropy": _divergence}[method](inputs)

    def best(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
        return min(ranges, key=lambda found: error(*found))

    low, high = best((share * inputs.low, share * inputs.high) for share in _SHARES)
    # One tail may be longer than the other: each end once more by itself.
    low, high = best((low, share * inputs.high) for share in _SHARES)
    return best((share * inputs.low, high) for share in _SHARES)


def _squared_error(inputs: Inputs) -> Callable[[float, float], float]:
    there = inputs.counts > 0
    values, counts = torch.from_numpy(inputs.middles[there]).float(), torch.from_numpy(inputs.counts[there])

    def error(low: float, high: float) -> float:
        return float((counts * (round_static(values, *parameters(low, high)) - values).double() ** 2).sum())

    return error


def _divergence(inputs: Inputs) -> Callable[[float, float], float]:
    middles, counts = inputs.middles, inputs.counts
    levels = HIGH - LOW + 1

    def divergence(low: float, high: float) -> float:
        inside = (middles >= low) & (middles <= high)
        if not inside.any():
            return float("inf")
        own, wanted = counts[inside], counts[inside].copy()
        wanted[0] += counts[middles < low].sum()  # what is cut off lands on the outermost levels
        wanted[-1] += counts[middles > high].sum()
        level = np.arange(len(own)) * levels // len(own)
        there = own > 0
        even = np.bincount(level, own, levels) / np.maximum(np.bincount(level, there, levels), 1)
        got = np.where(there, even[level], 0)
        p, q = wanted / wanted.sum(), np.maximum(got / max(got.sum(), 1), _TINY)
        return float((p * np.log(np.maximum(p, _TINY) / q)).sum())

    return divergence
