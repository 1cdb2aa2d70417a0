"""Weights on a device, one class per way of multiplying by them.

``product`` is the library's product with ``x`` ``[rows, K]``, which is e4m3 for a class that ``reads_fp8`` and of the
compute type otherwise; so is the result, ``[rows, M]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from espalier.gpu.form import FP8, FP8_MAX


class Weight(ABC):
    """A linear layer's weight ``[M, K]`` and bias ``[M]`` or None."""

    format: ClassVar[str]
    reads_fp8: bool = False
    bias: torch.Tensor | None

    @abstractmethod
    def product(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """``x @ W.T``, plus the bias when ``add_bias``."""


@dataclass(frozen=True)
class Dense(Weight):
    """In the compute type."""

    format = "dense"
    values: torch.Tensor
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """``x`` in the compute type."""
        return torch.nn.functional.linear(x, self.values, self.bias if add_bias else None)


@dataclass(frozen=True)
class Fp8(Weight):
    """In e4m3 with one scale. ``factor``: that scale times the activations'; ``scales``: both, on the device.

    ``wide``: the same numbers in float32, on a device that multiplies no others; None on a GPU.
    """

    format = "dense"
    reads_fp8 = True
    values: torch.Tensor
    factor: float
    scales: tuple[torch.Tensor, torch.Tensor]
    bias: torch.Tensor | None
    dtype: torch.dtype
    wide: torch.Tensor | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, x_scale: float, dtype: torch.dtype) -> Fp8:
        """Round a float32 ``weight``, its largest entry to e4m3's largest number; ``x_scale`` is the activations'."""
        scale = float(weight.abs().max()) / FP8_MAX or 1.0
        values = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        scales = (torch.tensor(x_scale, device=weight.device), torch.tensor(scale, device=weight.device))
        return cls(values, x_scale * scale, scales, bias, dtype, None if weight.is_cuda else values.float())

    def product(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """``x`` as e4m3."""
        bias = self.bias if add_bias else None
        if self.wide is not None:
            y = x.float() @ self.wide.T * self.factor
            return (y if bias is None else y + bias).to(self.dtype)
        # The result stays wide: PyTorch 2.10 and later ignore the scale of an e4m3 result (pytorch/pytorch#190449).
        x_scale, scale = self.scales
        found: torch.Tensor = torch._scaled_mm(
            x, self.values.T, x_scale, scale, bias=bias, out_dtype=self.dtype, use_fast_accum=True
        )
        return found


class Semistructured(Weight):
    """Two of every four entries along K are zero, and tensor cores skip them: ``dense``, compressed by cuSPARSELt."""

    format = "2:4"

    def __init__(self, dense: Dense | Fp8) -> None:
        """Compress a CUDA weight. Raises RuntimeError where its type or shape does not suit the library."""
        self.dense = dense
        self.bias = dense.bias
        self.reads_fp8 = dense.reads_fp8
        self.packed: torch.Tensor = torch._cslt_compress(dense.values)

    def product(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """``x`` in the form that the dense weight reads."""
        bias = self.bias if add_bias else None
        if isinstance(self.dense, Dense):
            found: torch.Tensor = torch._cslt_sparse_mm(self.packed, x.T, bias=bias, transpose_result=True)
            return found
        x_scale, scale = self.dense.scales
        found = torch._cslt_sparse_mm(
            self.packed, x.T, alpha=x_scale * scale, out_dtype=self.dense.dtype, transpose_result=True
        )
        return found if bias is None else found + bias


@dataclass(frozen=True)
class Int8(Weight):
    """8 bit integers with a scale per row, and 8 bit activations: ``QLinear`` of the dialect, its sums exact.

    ``values`` int8 ``[M, K]`` and ``zero`` int32 ``[M]``, an unsigned weight shifted to signed.
    ``x_scale``, ``x_zero``: those of the activations, int8 or not (``signed``); None where each token has its own.
    """

    format = "dense"
    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bias: torch.Tensor | None
    x_scale: float | None
    x_zero: int | None
    signed: bool
    dtype: torch.dtype

    def product(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """``x`` in the compute type."""
        quantized, x_scale, x_zero = self._quantize(x.float())
        total = _integer_product(quantized, self.values)
        # sum (q - z)(w - y) = sum q w - z sum w - y sum q + K z y
        rows = quantized.sum(dim=1, keepdim=True, dtype=torch.int32)
        columns = self.values.sum(dim=1, dtype=torch.int32)
        total = total - x_zero * columns - self.zero * rows + x.shape[1] * x_zero * self.zero
        y = total.float() * (x_scale * self.scale)
        return (y + self.bias if add_bias and self.bias is not None else y).to(self.dtype)

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Signed integers of ``x``, and their scale and zero point, of the tensor or ``[rows, 1]``."""
        if self.x_scale is not None and self.x_zero is not None:
            scale, zero = scalars(self.x_scale, self.x_zero, x.device)
            return quantize_int8(x, scale, zero, signed=self.signed), scale, zero if self.signed else zero - 128
        low, high = x.amin(dim=1, keepdim=True).clamp(max=0), x.amax(dim=1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, 1.0, torch.where(scale.isfinite(), scale, float("nan")))
        zero = (-low / scale).round().nan_to_num(0).clamp(0, 255).to(torch.int32)
        return quantize_int8(x, scale, zero, signed=False), scale, zero - 128


def scalars(scale: float, zero: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale (float32) and a zero point (int32) on a device, filled in there: a capture allows no copy from the host.

    Tensors, because PyTorch multiplies by the inverse of a number on the host, which rounds otherwise.
    """
    zeros = torch.full((), zero, dtype=torch.int32, device=device)
    return torch.full((), scale, dtype=torch.float32, device=device), zeros


def quantize_int8(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """As ONNX's QuantizeLinear; unsigned results are shifted by 128 to fit int8. NaN becomes the lowest integer."""
    low, shift = (-128, 0) if signed else (0, 128)
    steps = ((x / scale).round() + zero).clamp(low, low + 255).nan_to_num(low)
    return (steps - shift).to(torch.int8)


def dequantize_int8(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """As ONNX's DequantizeLinear of what :func:`quantize_int8` gave."""
    return (q.to(torch.int32) + (0 if signed else 128) - zero).float() * scale


def _integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact int32 ``x @ weight.T`` of int8 operands, padded to what cuBLAS takes: 17 rows, multiples of 8."""
    rows, depth = x.shape
    features = weight.shape[0]
    if x.device.type == "cuda":
        more_rows = max(0, 17 - rows)
        x = torch.nn.functional.pad(x, (0, -depth % 8, 0, more_rows))
        weight = torch.nn.functional.pad(weight, (0, -depth % 8, 0, -features % 8))
    return torch._int_mm(x.contiguous(), weight.T)[:rows, :features]


def is_semistructured(weight: np.ndarray) -> bool:
    """Whether at most two of every four neighbours along K are nonzero, and there are zeros at all."""
    if weight.shape[1] % 4:
        return False
    groups = np.count_nonzero(weight.reshape(weight.shape[0], -1, 4), axis=2)
    return bool((groups <= 2).all())
