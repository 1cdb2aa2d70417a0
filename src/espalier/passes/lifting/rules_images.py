"""Convolutional networks: convolutions, pools, and what stands between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.images import Pair, Window
from espalier.passes.lifting import images, quantized, regions
from espalier.passes.lifting.convolutions import convolve, normalised
from espalier.passes.lifting.lifter import FLOATS, Lifter, Result, rule
from espalier.passes.lifting.rules_math import shifted
from espalier.passes.lifting.rules_quantized import integer_bias, names, on_floats, product_of
from espalier.passes.lifting.values import BF, BSF, Constant, Dequantized, Opaque, Tensor, Value, View, rows
from espalier.passes.symbolic import Expr


@rule("Conv")
def conv(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, weight = images.image(lift, inputs[0], node.inputs[0]), inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    grid = images.grid_of(x)
    if x is None or grid is None or not isinstance(weight, Constant) or len(weight.shape) != 4:
        return None
    if weight.dtype not in FLOATS or (bias is not None and not isinstance(bias, Constant)):
        return None
    window = _window(lift, grid, weight.shape[2:], attrs, node.outputs[0])
    if not isinstance(window, Window):
        return window
    vector = lift.float32(bias) if isinstance(bias, Constant) else ""
    return convolve(lift, x, weight, window, vector, node.outputs[0])


def _window(lift: Lifter, grid: Pair, kernel: tuple[int, ...], attrs: dict[str, Any], name: str) -> Window | Result:
    """The window of a convolution; what is known of the result where the engine has none."""
    if attrs.get("group", 1) != 1:
        return Opaque(lift.declared(name), "the engine has no convolution in groups")
    return images.window(lift, grid, kernel, attrs, name)


@rule("ConvInteger")
def conv_integer(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    product = product_of(lift, names(node, 4), along=0)
    if product is None:
        return None
    grid = images.grid_of(product.left.x)
    weight = product.right
    if grid is None or not isinstance(weight, Dequantized) or weight.q.ndim != 4:
        return None
    window = _window(lift, grid, weight.q.shape[2:], attrs, node.outputs[0])
    return replace(product, window=window) if isinstance(window, Window) else window


@rule("QLinearConv")
def q_linear_conv(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    operands = names(node, 9)
    x = quantized.float_of(lift, operands[:3])
    weight = quantized.float_of(lift, operands[3:6], along=0)
    found = [x, weight]
    if operands[8]:
        found.append(integer_bias(lift, operands[8], operands[1:3], operands[4:6]))
    return on_floats(lift, node, "Conv", found, attrs, operands[6:8])


@rule("BatchNormalization")
def batch_normalization(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, *vectors = inputs
    if len(node.outputs) > 1 or attrs.get("training_mode", 0) or not isinstance(x, View) or len(vectors) != 4:
        return None
    if images.grid_of(x) is None and (rows(x) is None or len(x.axes) != 2):
        return None
    arrays = [v.array.astype(np.float64).reshape(-1) for v in vectors if isinstance(v, Constant)]
    if len(arrays) != 4 or any(a.size != x.base.features for a in arrays):
        return None
    scale, shift, mean, variance = arrays
    factor = scale / np.sqrt(variance + float(attrs.get("epsilon", 1e-5)))
    if not np.isfinite(factor).all():
        return None
    alone = len(lift.consumers.get(node.inputs[0], [])) == 1 and node.inputs[0] not in lift.graph.outputs
    after = (shift - mean * factor).astype(np.float32)
    return normalised(lift, x, factor.astype(np.float32), after, node.outputs[0], alone)


# --- pools -----------------------------------------------------------------------------------------------------------


@rule("MaxPool", "AveragePool")
def pool(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    grid = images.grid_of(x)
    if not isinstance(x, View) or grid is None or x.base.layout != BSF or len(node.outputs) > 1:
        return None
    largest = node.op == "MaxPool"
    window = images.window(lift, grid, tuple(attrs.get("kernel_shape", ())), attrs, node.outputs[0])
    # Windows that begin beyond the bottom or the right edge count differently from version to version.
    if window is None or (not largest and attrs.get("ceil_mode")):
        return None
    tokens = lift.solid(x)
    extra = {} if largest else {"count_edges": bool(attrs.get("count_include_pad", 0))}
    tensor = Tensor("", BSF, tokens.batch, Expr.of(window.pixels), tokens.features)
    op = "MaxPool" if largest else "MeanPool"
    attrs = {"window": window.numbers, **extra}
    base = lift.emit(op, [tokens.name], attrs, tensor, name=f"{node.outputs[0]}.pixels").base
    return images.single(lift, View(base, images.image_axes(base, window.result)), node.outputs[0])


@rule("GlobalAveragePool")
def global_average_pool(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    return images.mean(lift, x, True, node.outputs[0]) if isinstance(x, View) else None


@rule("GlobalMaxPool")
def global_max_pool(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    grid = images.grid_of(inputs[0])
    return pool(lift, Node("MaxPool", node.inputs, node.outputs), {"kernel_shape": grid}, inputs) if grid else None


# --- activations with limits -----------------------------------------------------------------------------------------


@rule("Clip")
def clip(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, *limits = [*inputs, None, None][:3]
    given = [attrs.get("min"), attrs.get("max")]
    low, high = (given[k] if v is None else images.number(v) for k, v in enumerate(limits))
    if not isinstance(x, View) or any(v is not None and images.number(v) is None for v in limits):
        return None
    return _between(lift, x, low, high, node.outputs[0])


def _between(lift: Lifter, x: View, low: float | None, high: float | None, name: str) -> View | None:
    found: View | None = x
    if low is not None and found is not None:
        last = "" if high is not None else name
        found = (
            regions.activate(lift, found, "relu", last) if low == 0 else images.bounded(lift, found, "Max", low, last)
        )
    if high is not None and found is not None:
        found = images.bounded(lift, found, "Min", high, name)
    return found


def _hard_sigmoid(lift: Lifter, x: View, alpha: float, beta: float, name: str) -> View | None:
    found = shifted(lift, View(x.base, x.axes, x.scale * alpha), beta)
    return _between(lift, found, 0.0, 1.0, name) if found is not None else None


@rule("HardSigmoid")
def hard_sigmoid(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    if not isinstance(x, View):
        return None
    return _hard_sigmoid(lift, x, float(attrs.get("alpha", 0.2)), float(attrs.get("beta", 0.5)), node.outputs[0])


@rule("HardSwish")
def hard_swish(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    gate = _hard_sigmoid(lift, x, 1 / 6, 0.5, "") if isinstance(x, View) else None
    if gate is None or not isinstance(x, View):
        return None
    solid = lift.solid(x)
    tensor = Tensor("", solid.layout, solid.batch, solid.tokens, solid.features)
    return lift.emit("Mul", [solid.name, gate.base.name], {}, tensor, axes=x.axes, name=node.outputs[0])


@rule("LeakyRelu")
def leaky_relu(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, alpha = inputs[0], float(attrs.get("alpha", 0.01))
    if not isinstance(x, View) or x.base.integer or x.base.layout not in (BSF, BF) or not 0 <= alpha <= 1:
        return None
    solid = lift.solid(x)
    tensor = Tensor("", solid.layout, solid.batch, solid.tokens, solid.features)
    less = lift.emit("Mul", [solid.name, lift.scalar(alpha)], {}, tensor, axes=x.axes)
    return lift.emit("Max", [solid.name, less.base.name], {}, tensor, axes=x.axes, name=node.outputs[0])


# --- the same on integers --------------------------------------------------------------------------------------------


@rule("QLinearConcat", domain="com.microsoft")
def q_linear_concat(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    output, parts = node.inputs[:2], node.inputs[2:]
    operands = [quantized.float_of(lift, parts[k : k + 3]) for k in range(0, len(parts), 3)]
    return on_floats(lift, node, "Concat", operands, attrs, output)
