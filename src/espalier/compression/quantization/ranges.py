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

_VALUES = 1 << 19
"""Numbers of a layer's inputs that are kept for comparisons."""
_SEARCHED = 1 << 17
"""Numbers among them that a search looks at."""
_SHARES = np.linspace(1.0, 0.2, 41)
_BINS = 2048
_TINY = 1e-12


@dataclass
class Inputs:
    """What a layer got: the range of all, and an evenly spread choice of tokens. ``batches``: how many will come."""

    features: int
    batches: int
    low: float = 0.0
    high: float = 0.0
    tokens: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Inputs ``[tokens, features]``, float32 and finite."""
        if not x.numel():
            return
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.tokens += len(x)
        wanted = max(1, _VALUES // self.features // self.batches)
        self.kept.append(x[:: max(1, len(x) // wanted)][:wanted].clone())

    @property
    def sample(self) -> Tensor:
        """float32 ``[tokens, features]``."""
        return torch.cat(self.kept)


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
    values = inputs.sample.flatten().cpu()
    if method == "percentile":
        low, high = np.percentile(values.numpy(), [100 - percentile, percentile])
        return min(0.0, float(low)), max(0.0, float(high))
    values = values[:: max(1, len(values) // _SEARCHED)]
    error = {"mse": _squared_error, "entropy": _divergence}[method](values, inputs.low, inputs.high)

    def best(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
        return min(ranges, key=lambda found: error(*found))

    low, high = best((share * inputs.low, share * inputs.high) for share in _SHARES)
    # One tail may be longer than the other: each end once more by itself.
    low, high = best((low, share * inputs.high) for share in _SHARES)
    return best((share * inputs.low, high) for share in _SHARES)


def _squared_error(values: Tensor, low: float, high: float) -> Callable[[float, float], float]:
    def error(low: float, high: float) -> float:
        return float(((round_static(values, *parameters(low, high)) - values) ** 2).mean())

    return error


def _divergence(values: Tensor, low: float, high: float) -> Callable[[float, float], float]:
    counts, edges = np.histogram(values.numpy(), bins=_BINS, range=(low, high))
    middles = (edges[1:] + edges[:-1]) / 2
    levels = HIGH - LOW + 1

    def divergence(low: float, high: float) -> float:
        inside = (middles >= low) & (middles <= high)
        own, wanted = counts[inside].astype(np.float64), counts[inside].astype(np.float64)
        wanted[0] += counts[middles < low].sum()  # what is cut off lands on the outermost levels
        wanted[-1] += counts[middles > high].sum()
        level = np.arange(len(own)) * levels // len(own)
        there = own > 0
        even = np.bincount(level, own, levels) / np.maximum(np.bincount(level, there, levels), 1)
        got = np.where(there, even[level], 0)
        p, q = wanted / wanted.sum(), np.maximum(got / max(got.sum(), 1), _TINY)
        return float((p * np.log(np.maximum(p, _TINY) / q)).sum())

    return divergence
