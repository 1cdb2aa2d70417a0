"""Convolutions: linear layers of what a window shows of each pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.images import Window, aligned
from espalier.passes.lifting import quantized, rules_math
from espalier.passes.lifting.images import image_axes, pixel_axes, single
from espalier.passes.lifting.lifter import Lifter
from espalier.passes.lifting.values import BF, BSF, Constant, Dequantized, Rounding, Tensor, View
from espalier.passes.symbolic import Expr

MOST_INPUTS = 65535
"""Of a linear layer in the engine."""


def convolve(
    lift: Lifter, x: View, weight: Constant, window: Window, bias: str, name: str, *, dynamic: bool = False
) -> View | None:
    """``x``, an image, under a weight ``[M, F, kernel rows, kernel columns]``; ``bias`` names a vector.

    ``dynamic``: a quantised weight gives every window its own scale and zero point.
    """
    features = x.base.features
    # Of an image of one pixel a window shows that and edges.
    if weight.shape[1] != features or (x.base.layout == BF and not window.is_whole_image):
        return None
    source = lift.solid(x)
    known = lift.rounded.get(source.name) if isinstance(weight, Dequantized) and not dynamic else None
    align = 4 if known is not None and not window.is_whole_image else 1
    inputs = window.taps * aligned(features, align)
    if inputs > MOST_INPUTS:
        return None
    pixels = View(source, pixel_axes(source, window.source))
    if not window.is_whole_image:
        start = source.name if known is None else known.source
        tensor = Tensor("", BSF, source.batch, Expr.of(window.pixels), inputs)
        pixels = lift.emit("Unfold", [start], {"window": window.numbers, "align": align}, tensor, name=f"{name}.window")
        if known is not None:
            lift.rounded[pixels.base.name] = Rounding(pixels.base.name, known.scale, known.zero)
        pixels = View(pixels.base, pixel_axes(pixels.base, window.result))
    matrix = _matrix(weight, align)
    if dynamic and isinstance(matrix, Dequantized):
        found = quantized.layer(lift, pixels, matrix, True, bias, [], name)
    else:
        found = rules_math.linear(lift, pixels, matrix, True, bias, name)
    if found is None:
        return None
    return single(lift, View(found.base, image_axes(found.base, window.result), found.scale), name)


def _matrix(weight: Constant, align: int) -> Constant:
    """The weight as ``[M, taps * F]``, with the features of each tap rounded up to a multiple of ``align``."""
    name = f"{weight.name}.matrix{align}"
    if isinstance(weight, Dequantized):
        fill = np.broadcast_to(weight.zero, weight.q.shape[:1])
        return Dequantized(name, _flat(weight.q, align, fill), weight.scale, weight.zero, 0)
    return Constant(name, _flat(weight.array, align, np.zeros(len(weight.array))))


def _flat(array: np.ndarray, align: int, fill: np.ndarray) -> np.ndarray:
    outputs, features = array.shape[:2]
    taps = array.reshape(outputs, features, -1).transpose(0, 2, 1)
    wide = np.empty((*taps.shape[:2], aligned(features, align)), array.dtype)
    wide[:] = fill[:, None, None]
    wide[..., :features] = taps
    return wide.reshape(outputs, -1)


def normalised(lift: Lifter, x: View, factor: np.ndarray, shift: np.ndarray, name: str, alone: bool) -> View | None:
    """``x * factor + shift`` per feature. ``alone``: nobody else reads x, so that a layer before takes both over."""
    made = next((n for n in reversed(lift.nodes) if n.outputs == [x.base.name]), None) if alone else None
    tensor = replace(x.base, name="")
    if made is not None and x.scale == 1.0 and made.op in ("Linear", "QLinear"):
        inputs = _scaled(lift, made, factor, shift, name)
        return lift.emit(made.op, inputs, made.attrs, tensor, axes=x.axes, name=name)
    solid = lift.solid(x)
    times = lift.emit("Mul", [solid.name, lift.constant(f"{name}.factor", factor)], {}, tensor, axes=x.axes)
    return lift.emit(
        "Add", [times.base.name, lift.constant(f"{name}.shift", shift)], {}, tensor, axes=x.axes, name=name
    )


def _scaled(lift: Lifter, made: Node, factor: np.ndarray, shift: np.ndarray, name: str) -> list[str]:
    """The operands of a linear layer whose result is to be scaled and shifted."""
    inputs = [*made.inputs, "", ""]
    which, at = (1, 2) if made.op == "Linear" else (2, 4)
    old = np.asarray(lift.out.constants[inputs[which]])
    bias = lift.out.constants[inputs[at]] if inputs[at] else np.float32(0)
    scales = factor[:, None] if made.op == "Linear" else factor
    inputs[which] = lift.constant(f"{inputs[which]}.scaled", (old * scales).astype(np.float32))
    inputs[at] = lift.constant(f"{name}.bias", (bias * factor + shift).astype(np.float32))
    return inputs[: max(len(made.inputs), at + 1)]
