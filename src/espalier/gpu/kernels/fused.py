"""Triton kernels of one pass over memory: normalise, activate, quantise, average.

Each reads its rows once, computes in float32, and writes the result in the compute type, as e4m3, or as both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from espalier.gpu.form import FP8_MAX, Form, Result, empty_result

_LARGEST: tl.constexpr = tl.constexpr(FP8_MAX)
_ELEMENTS = 1024
"""Elements per program of the elementwise kernel."""


@triton.jit
def to_e4m3(x, inverse_scale):
    """Saturating, and NaN stays NaN."""
    scaled = tl.clamp(x * inverse_scale, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv)


@triton.jit
def _tanh(x):
    # From the exponential of a negative number, which cannot overflow.
    small = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """One of the activations of the dialect, on float32."""
    if KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "tanh":
        y = _tanh(x)
    elif KIND == "sigmoid":
        y = tl.sigmoid(x)
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(KIND == "")
        y = x
    return y


FUSED_ACTIVATIONS = frozenset({"", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid", "silu", "quick_gelu"})
"""What :func:`activate` knows."""


@triton.jit
def _norm_kernel(
    x, residual, gamma, beta, out, out8, x_stride, residual_stride, features, epsilon, inverse_scale,
    HAS_RESIDUAL: tl.constexpr, HAS_BETA: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + column, inside, 0.0).to(tl.float32)
    mean = tl.sum(value, 0) / features
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / features
    y = centred / tl.sqrt(variance + epsilon) * tl.load(gamma + column, inside, 0.0)
    if HAS_BETA:
        y += tl.load(beta + column, inside, 0.0)
    if KEEP:
        tl.store(out + row * features + column, y.to(out.dtype.element_ty), inside)
    if QUANTIZE:
        tl.store(out8 + row * features + column, to_e4m3(y, inverse_scale), inside)


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    epsilon: float,
    form: Form,
) -> Result:
    """``LayerNorm(x + residual)`` over the last axis of ``[rows, F]``. ``gamma``, ``beta`` float32 ``[F]``."""
    rows, features = x.shape
    kept, quantized = empty_result((rows, features), x.device, form)
    block = triton.next_power_of_2(features)
    if rows:
        _norm_kernel[(rows,)](
            x, x if residual is None else residual, gamma, gamma if beta is None else beta,
            x if kept is None else kept, x if quantized is None else quantized,
            x.stride(0), 0 if residual is None else residual.stride(0), features, epsilon, form.inverse_scale,
            HAS_RESIDUAL=residual is not None, HAS_BETA=beta is not None,
            KEEP=kept is not None, QUANTIZE=quantized is not None,
            BLOCK=block, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
    return kept, quantized


@triton.jit
def _activate_kernel(
    x, bias, out, out8, x_stride, features, total, inverse_scale,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    row, column = place // features, place % features
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, inside, 0.0).to(tl.float32)
    y = activate(value, KIND)
    if KEEP:
        tl.store(out + place, y.to(out.dtype.element_ty), inside)
    if QUANTIZE:
        tl.store(out8 + place, to_e4m3(y, inverse_scale), inside)


def unary(x: torch.Tensor, bias: torch.Tensor | None, kind: str, form: Form) -> Result:
    """``activation(x + bias)`` of ``[rows, F]``; ``kind`` is of :data:`FUSED_ACTIVATIONS`, ``bias`` of ``[F]``."""
    kept, quantized = empty_result((x.shape[0], x.shape[1]), x.device, form)
    if x.numel():
        _activate_kernel[(triton.cdiv(x.numel(), _ELEMENTS),)](
            x, x if bias is None else bias, x if kept is None else kept, x if quantized is None else quantized,
            x.stride(0), x.shape[1], x.numel(), form.inverse_scale,
            KIND=kind, HAS_BIAS=bias is not None, KEEP=kept is not None, QUANTIZE=quantized is not None,
            BLOCK=_ELEMENTS, num_warps=4,
        )  # fmt: skip
    return kept, quantized


@triton.jit
def _mean_kernel(
    x, bounds, weights, out, x_stride, features, epsilon, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    first, last = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    total = tl.zeros([BLOCK], tl.float32)
    weight_sum = 0.0
    for token in range(first, last):
        value = tl.load(x + tl.cast(token, tl.int64) * x_stride + column, inside, 0.0).to(tl.float32)
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(weights + token)
        total += value * weight
        weight_sum += weight
    mean = total / tl.maximum(weight_sum, epsilon)
    tl.store(out + sequence.to(tl.int64) * features + column, mean.to(out.dtype.element_ty), inside)


def segment_mean(x: torch.Tensor, bounds: torch.Tensor, weights: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """Mean over each sequence's tokens: ``[T, F]`` to ``[B, F]``. In order, so the same bits every time.

    ``bounds`` int32 ``[B + 1]``: where sequences begin. ``weights`` float32 ``[T]``, None for all ones.
    """
    sequences, features = len(bounds) - 1, x.shape[1]
    out = torch.empty((sequences, features), dtype=x.dtype, device=x.device)
    block = min(256, triton.next_power_of_2(features))
    _mean_kernel[(sequences, triton.cdiv(features, block))](
        x, bounds, x if weights is None else weights, out, x.stride(0), features, epsilon,
        HAS_WEIGHTS=weights is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
