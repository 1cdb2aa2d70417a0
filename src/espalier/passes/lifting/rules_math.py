"""Linear layers, elementwise arithmetic, normalisation and reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.ops import BIAS_OPERAND
from espalier.passes.lifting import attention, extents, images, pooling, quantized, regions
from espalier.passes.lifting.axes import BATCH, FEATURE, TOKEN, Axes, axis
from espalier.passes.lifting.embedding import token_source
from espalier.passes.lifting.lifter import FLOATS, Lifter, Result, SameExtentError, rule
from espalier.passes.lifting.values import (
    BF,
    BSF,
    SF,
    Constant,
    Dequantized,
    Factor,
    Masked,
    OneHot,
    Opaque,
    Product,
    Row,
    Scores,
    Tensor,
    Value,
    View,
    rows,
    widened,
)
from espalier.passes.symbolic import ONE, Expr

ACTIVATIONS = {
    "Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Erf": "erf", "Exp": "exp", "Sqrt": "sqrt", "Abs": "abs",
    "Neg": "neg", "Reciprocal": "reciprocal", "Softplus": "softplus",
}  # fmt: skip

# --- linear layers -----------------------------------------------------------------------------------------------


def linear(
    lift: Lifter, x: View, weight: Constant, transposed: bool, bias: str, name: str, factor: float = 1.0
) -> View | None:
    """``x @ weight`` (``weight.T`` when ``transposed``) plus a bias constant; the scale of x moves to the result."""
    if isinstance(weight, Dequantized):
        found = quantized.linear(lift, x, weight, transposed, bias, name, factor)
        if found is not None:
            return found
    array = weight.array
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.dtype.name not in FLOATS:
        return None
    inputs, outputs = array.shape[::-1] if transposed else array.shape
    if inputs != x.base.features or (bias and x.scale != 1.0):
        return None
    squeezed = array is not weight.array

    def turn(a: np.ndarray) -> np.ndarray:
        a = a.reshape(a.shape[-2:])
        a = a if transposed else a.T
        return a * np.float32(factor) if factor != 1.0 else a

    stem = ("" if transposed else ".T") + (".2d" if squeezed else "") + (f".x{factor}" if factor != 1.0 else "")
    constant = lift.float32(weight, stem, turn)
    tensor = replace(x.base, name="", features=outputs)
    view = lift.emit("Linear", [x.base.name, constant, bias], {}, tensor, axes=widened(x, outputs), name=name)
    return replace(view, scale=x.scale)


@rule("MatMul")
def matmul(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    left, right = inputs
    if isinstance(right, Constant):
        x = rows(left)
        if x is not None:
            return linear(lift, x, right, False, "", node.outputs[0])
        if isinstance(left, OneHot) and right.array.ndim == 2 and right.array.shape[0] == left.depth:
            ids, width = left.ids, right.array.shape[1]
            tensor = Tensor("", BSF, ids.base.batch, ids.base.tokens, width)
            axes = (*ids.axes, axis(FEATURE, width))
            return lift.emit(
                "Embedding", [lift.float32(right), ids.base.name], {}, tensor, axes=axes, name=node.outputs[0]
            )
        return None
    return attention.matmul(lift, node.outputs[0], left, right, 1.0)


@rule("FusedMatMul", domain="com.microsoft")
def fused_matmul(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    left, right = inputs
    alpha = float(attrs.get("alpha", 1.0))
    if attrs.get("transBatchA") or attrs.get("transBatchB") or attrs.get("transA"):
        return None
    if isinstance(right, Constant):
        x = rows(left)
        found = linear(lift, x, right, bool(attrs.get("transB")), "", node.outputs[0]) if x is not None else None
        return replace(found, scale=found.scale * alpha) if found is not None else None
    if isinstance(right, View) and attrs.get("transB"):
        right = replace(right, axes=(*right.axes[:-2], right.axes[-1], right.axes[-2]))
    return attention.matmul(lift, node.outputs[0], left, right, alpha)


@rule("Gemm")
@rule("FusedGemm", domain="com.microsoft")
def gemm(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    alpha, beta = float(attrs.get("alpha", 1.0)), float(attrs.get("beta", 1.0))
    if isinstance(x, View) and attrs.get("transA"):
        x = replace(x, axes=x.axes[::-1])
    view = rows(x)
    if view is None or len(view.axes) != 2 or not isinstance(weight, Constant):
        return None
    transposed = bool(attrs.get("transB"))
    outputs = weight.array.shape[0 if transposed else 1]
    name = ""
    if bias is not None:
        if (
            not isinstance(bias, Constant)
            or bias.array.size not in (1, outputs)
            or bias.array.shape[:-1] not in ((), (1,))
        ):
            return None
        size = outputs
        name = lift.float32(
            bias,
            f".b{size}x{beta}",
            lambda a: (
                np.broadcast_to(a.reshape(-1), (size,)) * np.float32(beta)
                if beta != 1.0 or a.size != size
                else a.reshape(-1)
            ),
        )
        if view.scale != 1.0:
            view = View(lift.solid(view), view.axes)
    if node.op == "Gemm":
        return linear(lift, view, weight, transposed, name, node.outputs[0], alpha)
    kind = ACTIVATIONS.get(attrs.get("activation", ""))
    found = linear(lift, view, weight, transposed, name, "", alpha) if kind else None
    return regions.activate(lift, found, kind, node.outputs[0]) if kind else None


def _with_bias(lift: Lifter, x: View, bias: Constant, name: str) -> View | None:
    """A linear layer plus a constant: the bias of one that has none yet."""
    if x.scale != 1.0:
        return None
    made = next((n for n in reversed(lift.nodes) if n.outputs == [x.base.name]), None)
    at = BIAS_OPERAND.get(made.op) if made is not None and made.is_native else None
    if made is None or at is None or made.inputs[at]:
        return None
    vector = lift.float32(bias, ".flat", lambda a: a.reshape(-1)) if bias.array.ndim != 1 else lift.float32(bias)
    inputs = [*made.inputs[:at], vector, *made.inputs[at + 1 :]]
    return lift.emit(made.op, inputs, made.attrs, replace(x.base, name=""), axes=x.axes, name=name)


# --- elementwise arithmetic -----------------------------------------------------------------------------------


def scalar_of(value: Value | None) -> float | None:
    if (isinstance(value, Constant) and value.array.size == 1 and value.array.dtype.kind in "fiu") or (
        isinstance(value, Constant) and value.array.size == 1 and value.array.dtype.name == "bfloat16"
    ):
        return float(value.array.reshape(-1)[0])
    return None


@rule("Add", "Sub", "Mul", "Div")
def arithmetic(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    left, right = inputs
    op, name = node.op, node.outputs[0]
    known = extents.elementwise(lift, op, inputs)
    if known is not None:
        return known
    if isinstance(left, Factor | Product) or isinstance(right, Factor | Product):
        return quantized.combine(lift, op, left, right, name)
    if isinstance(left, Masked) or isinstance(right, Masked):
        return pooling.divide(lift, node, left, right) if op == "Div" else None
    if isinstance(left, Scores) or isinstance(right, Scores):
        return attention.combine(lift, node, left, right)
    if isinstance(left, Row) and isinstance(right, Row) and op == "Add" and left.array.shape == right.array.shape:
        shape = left.shape if len(left.shape) >= len(right.shape) else right.shape
        return Row(left.array + right.array, shape)
    if isinstance(left, View) and isinstance(right, View):
        return _two(lift, op, left, right, name)
    if isinstance(left, View) and not left.base.integer:
        return _one(lift, node, left, right, name, False)
    if isinstance(right, View) and not right.base.integer:
        return _one(lift, node, right, left, name, True)
    return None


def _one(lift: Lifter, node: Node, x: View, other: Value | None, name: str, swapped: bool) -> Value | None:
    """A view and something that is no view; ``swapped`` when the view is the second operand."""
    op = node.op
    number = scalar_of(other)
    shape = lift.shape(node.inputs[0 if swapped else 1])
    if number is not None and shape is not None and len(shape) <= len(x.axes):
        if op == "Mul" or (op == "Div" and not swapped and number != 0):
            factor = number if op == "Mul" else 1.0 / number
            return replace(x, scale=x.scale * factor)
        if op == "Sub" and swapped:
            x = replace(x, scale=-x.scale)
            op = "Add"
        if op in ("Add", "Sub"):
            return shifted(lift, x, number if op == "Add" else -number, name)
        return None
    if isinstance(other, Row):
        return _row(lift, op, x, lift.constant(name + ".row", other.array), len(other.shape), name, swapped)
    if isinstance(other, Constant) and other.array.dtype.name in FLOATS:
        array = other.array
        if images.channel_vector(x, array):
            vector = lift.float32(other, ".flat", lambda a: a.reshape(-1))
            biased = _with_bias(lift, x, other, name) if op == "Add" else None
            return biased or _vector(lift, op, x, vector, name, swapped)
        if array.size == x.base.features and array.ndim and array.shape[-1] == array.size:
            if op == "Add" and rows(x) is not None and array.ndim <= len(x.axes):
                found = _with_bias(lift, x, other, name)
                if found is not None:
                    return found
            vector = lift.float32(other, ".flat", lambda a: a.reshape(-1)) if array.ndim != 1 else lift.float32(other)
            return _row(lift, op, x, vector, array.ndim, name, swapped)
        return _table(lift, op, x, other, name) if not swapped or op in ("Add", "Mul") else None
    if op == "Mul" and isinstance(other, Opaque):
        return pooling.masked(lift, x, node.inputs[0 if swapped else 1])
    return None


def _row(lift: Lifter, op: str, x: View, vector: str, rank: int, name: str, swapped: bool) -> Value | None:
    """A view of rows and a constant of one value per feature."""
    return None if rows(x) is None or rank > len(x.axes) else _vector(lift, op, x, vector, name, swapped)


def shifted(lift: Lifter, x: View, number: float, name: str = "") -> View | None:
    """A view plus a number."""
    if x.base.integer or x.base.layout not in (BSF, SF, BF):
        return None
    solid = lift.solid(x)
    return lift.emit("Add", [solid.name, lift.scalar(number)], {}, replace(solid, name=""), axes=x.axes, name=name)


def _vector(lift: Lifter, op: str, x: View, vector: str, name: str, swapped: bool) -> View | None:
    """A view and a constant of one value per feature of its tensor."""
    if swapped and op == "Div":
        return None
    if swapped and op == "Sub":
        x, op = replace(x, scale=-x.scale), "Add"
    solid = lift.solid(x)
    return lift.emit(op, [solid.name, vector], {}, replace(solid, name=""), axes=x.axes, name=name)


def _table(lift: Lifter, op: str, x: View, other: Constant, name: str) -> Value | None:
    """Tokens plus a constant ``[S, F]``: the position embedding of a model with a fixed sequence length."""
    array, base = other.array, x.base
    tokens = base.tokens.number
    if op != "Add" or base.layout != BSF or tokens is None or x.axes != base.axes() or array.ndim not in (2, 3):
        return None
    if array.shape[-2:] != (tokens, base.features) or (array.ndim == 3 and array.shape[0] != 1):
        return None
    source = token_source(lift, base.tokens)
    if source is None:
        return None
    table = lift.float32(other, ".rows", lambda a: a.reshape(a.shape[-2:]))
    ids = lift.emit(
        "Positions", [source.base.name], {"offset": 0}, Tensor("", "1S", ONE, base.tokens, 1, True), integer=True
    )
    spread = lift.emit("Embedding", [table, ids.base.name], {}, Tensor("", SF, ONE, base.tokens, base.features))
    solid = lift.solid(x)
    return lift.emit("Add", [solid.name, spread.base.name], {}, replace(solid, name=""), axes=x.axes, name=name)


def _two(lift: Lifter, op: str, left: View, right: View, name: str) -> Value | None:
    """Two views whose axes agree; either may lack the batch."""
    if left.base.integer or right.base.integer:
        return None
    left, right = images.spread(lift, left, right) or (left, right)
    axes = _spread(lift, left, right)
    if axes is None or left.base.features != right.base.features:
        return None
    layouts = {left.base.layout, right.base.layout}
    if len(layouts) == 2 and layouts != {BSF, SF}:
        return None
    if not layouts <= {BSF, SF, BF}:
        return None
    a, b = lift.solid(left), lift.solid(right)
    wide = a if a.layout == BSF or b.layout != BSF else b
    return lift.emit(op, [a.name, b.name], {}, replace(wide, name=""), axes=axes, name=name)


def _spread(lift: Lifter, left: View, right: View) -> Axes | None:
    """Common axes of two views after broadcasting over the batch alone."""
    rank = max(len(left.axes), len(right.axes))
    wide = ((),) * (rank - len(left.axes)) + left.axes
    other = ((),) * (rank - len(right.axes)) + right.axes
    result = []
    for a, b in zip(wide, other, strict=True):
        if a == b:
            result.append(a)
        elif not a and [atom.label for atom in b] == [BATCH]:
            result.append(b)
        elif not b and [atom.label for atom in a] == [BATCH]:
            result.append(a)
        else:
            _same_extents(a, b)
            return None
    return tuple(result)


def _same_extents(a: Any, b: Any) -> None:
    """Restart with one name for two symbols that must be equal for the model to run at all."""
    for first, second in zip(a, b, strict=False):
        if first.label == second.label and first.label in (BATCH, TOKEN) and first.size != second.size:
            old, new = _symbol(second.size), _symbol(first.size)
            if old and new:
                raise SameExtentError(old, new)


def _symbol(size: Expr) -> str:
    names = size.symbols()
    return next(iter(names)) if len(names) == 1 and size == Expr.of(next(iter(names))) else ""


@rule(*ACTIVATIONS)
def unary(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    if node.op == "Neg" and isinstance(x, View) and not x.base.integer:
        return replace(x, scale=-x.scale)
    return regions.activate(lift, x, ACTIVATIONS[node.op], node.outputs[0])


@rule("Elu")
def elu(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    return regions.activate(lift, inputs[0], "elu", node.outputs[0]) if attrs.get("alpha", 1.0) == 1.0 else None


@rule("Gelu")
@rule("Gelu", "FastGelu", "BiasGelu", "QuickGelu", domain="com.microsoft")
def gelu(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, kind = inputs[0], "gelu"
    if node.op == "FastGelu" or attrs.get("approximate") == "tanh":
        kind = "gelu_tanh"
    if node.op == "QuickGelu":
        if abs(attrs.get("alpha", 1.702) - 1.702) > 1e-6:
            return None
        kind = "quick_gelu"
    bias = inputs[1] if len(inputs) > 1 else None
    if bias is not None:
        view = rows(x)
        if view is None or not isinstance(bias, Constant) or bias.array.shape != (view.base.features,):
            return None
        x = _with_bias(lift, view, bias, "") or _row(lift, "Add", view, lift.float32(bias), 1, "", False)
    return regions.activate(lift, x, kind, node.outputs[0])


# --- normalisation and reductions --------------------------------------------------------------------------------


def layer_norm(
    lift: Lifter, x: View, gamma: Value | None, beta: Value | None, epsilon: float, name: str
) -> View | None:
    if not isinstance(gamma, Constant) or gamma.array.shape != (x.base.features,):
        return None
    if beta is not None and (not isinstance(beta, Constant) or beta.array.shape != gamma.array.shape):
        return None
    solid = lift.solid(x)
    inputs = [solid.name, lift.float32(gamma), lift.float32(beta) if isinstance(beta, Constant) else ""]
    return lift.emit("LayerNorm", inputs, {"epsilon": float(epsilon)}, replace(solid, name=""), axes=x.axes, name=name)


@rule("LayerNormalization")
@rule("SkipLayerNormalization", domain="com.microsoft")
def layer_normalization(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    epsilon = attrs.get("epsilon", 1e-5 if node.domain == "" else 1e-12)
    name = node.outputs[0]
    if node.domain == "":
        x = rows(inputs[0])
        if x is None or attrs.get("axis", -1) not in (-1, len(x.axes) - 1):
            return None
        return layer_norm(lift, x, inputs[1], inputs[2] if len(inputs) > 2 else None, epsilon, name)
    left, right = rows(inputs[0]), rows(inputs[1])
    padded = [*inputs, None, None, None]
    if left is None or right is None:
        return None
    bias = padded[4]
    if bias is not None:
        if not isinstance(bias, Constant) or bias.array.shape != (left.base.features,):
            return None
        biased = _with_bias(lift, left, bias, "") or _row(lift, "Add", left, lift.float32(bias), 1, "", False)
        left = rows(biased)
    total = _two(lift, "Add", left, right, node.outputs[3] if len(node.outputs) > 3 else "") if left else None
    if not isinstance(total, View):
        return None
    return [layer_norm(lift, total, padded[2], padded[3], epsilon, name), None, None, total][: len(node.outputs)]


@rule("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare")
def reduction(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    where = attrs.get("axes") or (lift.ints(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else None)
    if node.op == "ReduceMean" and isinstance(x, View) and where and {k % len(x.axes) for k in where} == images.SPATIAL:
        return images.mean(lift, x, bool(attrs.get("keepdims", 1)), node.outputs[0])
    if where is None or len(where) != 1:
        return None
    if isinstance(x, Masked) and node.op == "ReduceSum":
        return pooling.total(x, where[0], bool(attrs.get("keepdims", 1)))
    regions.rowwise(lift, node.inputs[0])
    return None


@rule("LpNormalization")
def lp_normalization(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = rows(inputs[0])
    if x is None or attrs.get("p", 2) != 2 or attrs.get("axis", -1) not in (-1, len(x.axes) - 1):
        return None
    return regions.normalise(lift, x, float(np.finfo(np.float32).tiny), node.outputs[0])


@rule("Softmax")
def softmax(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    along = attrs.get("axis", -1 if lift.opset >= 13 else 1)
    x = inputs[0]
    if isinstance(x, Scores):
        return attention.softmax(x, along)
    view = rows(x)
    if view is None or along not in (-1, len(view.axes) - 1):
        return None
    solid = lift.solid(view)
    return lift.emit("Softmax", [solid.name], {}, replace(solid, name=""), axes=view.axes, name=node.outputs[0])


@rule("IsNaN")
def is_nan(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    return replace(x, nan=True) if isinstance(x, Scores) and x.normal and not x.nan else None


@rule("Where")
def where(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    known = extents.elementwise(lift, "Where", inputs)
    if known is not None:
        return known
    if any(isinstance(v, Scores) for v in inputs):
        return attention.where(lift, node, inputs)
    return None
