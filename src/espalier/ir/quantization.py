"""The arithmetic of 8 bit quantisation, as ONNX defines it: ``x`` is about ``(q - zero) * scale``.

Everything is computed in float32, by the operations and in the order of ONNX Runtime, so that integers agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

QUANTIZED = ("int8", "uint8")
"""Element types of quantised tensors."""


def quantize(x: Array, scale: Array, zero: Array) -> Array:
    """``saturate(round_half_even(x / scale) + zero)`` in the type of ``zero``. ``scale`` and ``zero`` broadcast.

    ONNX's QuantizeLinear. NaN becomes the lowest integer, as in ONNX Runtime.
    """
    limits = np.iinfo(zero.dtype)
    with np.errstate(all="ignore"):
        steps = np.rint(x.astype(np.float32, copy=False) / scale) + zero.astype(np.float32)
    lowest: Array = np.where(np.isnan(steps), limits.min, np.clip(steps, limits.min, limits.max))
    return lowest.astype(zero.dtype)


def dequantize(q: Array, scale: Array, zero: Array) -> Array:
    """``(q - zero) * scale`` in float32; ONNX's DequantizeLinear. ``scale`` and ``zero`` broadcast."""
    difference = q.astype(np.int32) - zero.astype(np.int32)
    found: Array = difference.astype(np.float32) * scale
    return found


def token_parameters(x: Array) -> tuple[Array, Array]:
    """Scale (float32) and zero point (uint8) of every token of ``x`` ``[..., F]``, both ``[..., 1]``.

    ONNX's DynamicQuantizeLinear over each token's own features: the range from the lowest to the highest, extended to
    hold 0, in 255 steps. The scale is 1 where all features are 0, and NaN for a token that holds NaN or an infinity or
    whose range overflows: all its integers are then 0, and every result is NaN.
    """
    with np.errstate(all="ignore"):
        low = np.minimum(x.min(axis=-1, keepdims=True, initial=0), np.float32(0))
        high = np.maximum(x.max(axis=-1, keepdims=True, initial=0), np.float32(0))
        scale = ((high - low) / np.float32(255)).astype(np.float32)
        scale = np.where(scale == 0, np.float32(1), np.where(np.isfinite(scale), scale, np.float32("nan")))
        zero = np.clip(np.rint(-low / scale), 0, 255)
    return scale, np.where(np.isnan(zero), 0, zero).astype(np.uint8)
