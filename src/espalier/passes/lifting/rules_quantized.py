"""Quantisation: Q and DQ, dynamic quantisation, products of integers, and ONNX Runtime's operators on integers.

An integer tensor is known as the float value that it stands for, so an operator on integers is the float operator
between a DequantizeLinear per operand and a QuantizeLinear, which is how ONNX defines it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.quantization import QUANTIZED
from espalier.passes.lifting.lifter import RULES, Lifter, Result, rule
from espalier.passes.lifting.quantized import (
    combine,
    dequantized,
    float_of,
    layer,
    parameters,
    quantized,
)
from espalier.passes.lifting.rules_fused import fused_attention
from espalier.passes.lifting.rules_layout import features
from espalier.passes.lifting.values import (
    Constant,
    Dequantized,
    Dynamic,
    Factor,
    Opaque,
    Product,
    Quantized,
    Unrounded,
    Value,
    View,
    rows,
)


def names(node: Node, count: int) -> list[str]:
    """The operands of a node, ``""`` for those left out."""
    return [*node.inputs, *[""] * count][:count]


@rule("QuantizeLinear")
@rule("QuantizeLinear", domain="com.microsoft")
def quantize_linear(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    _, scale, zero = names(node, 3)
    if attrs.get("block_size"):
        return None
    found = parameters(lift, scale, zero, lift.dtype(node.outputs[0]))
    x = inputs[0]
    if isinstance(x, Opaque) and not isinstance(x, Unrounded) and lift.prober.leaves(node.inputs[0]) is not None:
        # Computed from integer inputs alone, so part of a mask. Rounded, it could no longer say "minus infinity".
        x = Unrounded(x.shape, name=node.inputs[0])
    return quantized(lift, x, found, node.outputs[0])


@rule("DequantizeLinear")
@rule("DequantizeLinear", domain="com.microsoft")
def dequantize_linear(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    q, scale, zero = names(node, 3)
    if attrs.get("block_size"):
        return None
    return dequantized(lift, node.outputs[0], q, scale, zero, attrs.get("axis", 1))


# --- dynamic quantisation --------------------------------------------------------------------------------------------


@rule("DynamicQuantizeLinear")
def dynamic_quantize_linear(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x = inputs[0]
    if not isinstance(x, View) or x.base.integer or len(node.outputs) != 3:
        return None
    _, scale, zero = node.outputs
    return [Dynamic(View(lift.solid(x), x.axes), scale, zero), Factor((scale,)), None]


def _weight(lift: Lifter, q: str, zero: str, along: int) -> Dequantized | None:
    """A constant of integers less its zero points, in steps of 1; ``along``: the axis of its outputs."""
    matrix, offset = lift.get(q), lift.get(zero)
    if not isinstance(matrix, Constant) or matrix.array.dtype.name not in QUANTIZED or matrix.array.ndim < 2:
        return None
    if zero and not isinstance(offset, Constant):
        return None
    number = offset.array if isinstance(offset, Constant) else np.zeros((), matrix.array.dtype)
    if number.dtype != matrix.array.dtype or number.size not in (1, matrix.array.shape[along]):
        return None
    flat = number.reshape(() if number.size == 1 else -1)
    return Dequantized(q, matrix.array, np.ones((), np.float32), flat, along % matrix.array.ndim)


def product_of(lift: Lifter, operands: list[str], along: int = -1) -> Product | None:
    """``sum (a - a_zero) * (b - b_zero)`` of ``[a, b, a_zero, b_zero]``, where both are known; ``along``: the axis of a
    constant b's outputs.
    """
    a, b, a_zero, b_zero = operands
    a, b, a_zero, b_zero = operands
    left, right = lift.get(a), lift.get(b)
    if isinstance(left, Quantized):
        zero = lift.get(a_zero)
        known = zero.array if isinstance(zero, Constant) else np.zeros(() if not a_zero else 2, left.zero.dtype)
        if known.size != 1 or known.reshape(()) != left.zero:
            return None
    elif not isinstance(left, Dynamic) or left.zero != a_zero:
        return None
    scales = (left.scale,) if isinstance(left, Dynamic) else ()
    if isinstance(left, Dynamic) and isinstance(right, Dynamic):
        return Product(left, right, (left.scale, right.scale)) if right.zero == b_zero else None
    weight = _weight(lift, b, b_zero, along)
    return None if weight is None else Product(left, weight, scales)


@rule("MatMulInteger")
def matmul_integer(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    return product_of(lift, names(node, 4))


def _float_product(lift: Lifter, operands: list[str], bias: str, name: str) -> View | None:
    """A product of integers times its scales, plus a bias. ``operands``: a, b, their scales, their zero points."""
    a, b, a_scale, b_scale, a_zero, b_zero = operands
    product = product_of(lift, [a, b, a_zero, b_zero])
    scales = combine(lift, "Mul", _factor(lift, a_scale), _factor(lift, b_scale), name)
    return _plus(lift, combine(lift, "Mul", product, scales, name), bias, name)


def _factor(lift: Lifter, name: str) -> Factor | None:
    value = lift.get(name)
    if isinstance(value, Constant):
        return Factor((), value.array)
    return value if isinstance(value, Factor) else None


def _plus(lift: Lifter, value: Value | None, bias: str, name: str) -> View | None:
    if isinstance(value, View) and bias:
        add = Node("Add", ["", bias], [name], domain="")
        found = RULES["", "Add"](lift, add, {}, [value, lift.get(bias)])
        value = found if isinstance(found, View) else None
    return value if isinstance(value, View) else None


@rule("MatMulIntegerToFloat", domain="com.microsoft")
def matmul_integer_to_float(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    *operands, bias = names(node, 7)
    return _float_product(lift, operands, bias, node.outputs[0])


@rule("DynamicQuantizeMatMul", domain="com.microsoft")
def dynamic_quantize_matmul(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    _, b, b_scale, b_zero, bias = names(node, 5)
    x, weight = rows(inputs[0]), dequantized(lift, b, b, b_scale, b_zero, -1)
    if x is None or not isinstance(weight, Dequantized):
        return None
    view = layer(lift, View(lift.solid(x), x.axes), weight, False, "", [], node.outputs[0])
    return _plus(lift, view, bias, node.outputs[0])


@rule("QAttention", domain="com.microsoft")
def q_attention(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    a, b, bias, a_scale, b_scale, mask, a_zero, b_zero, past = names(node, 9)
    wide = rows(_float_product(lift, [a, b, a_scale, b_scale, a_zero, b_zero], bias, node.outputs[0] + ".qkv"))
    if past or wide is None or wide.axes != wide.base.axes() or wide.base.features % 3:
        return None
    width = wide.base.features // 3
    parts = [features(lift, wide, 2, k * width, (k + 1) * width, False, "") for k in range(3)]
    views = [part for part in parts if isinstance(part, View)]
    return fused_attention(lift, node, views, attrs, mask, "") if len(views) == 3 else None


# --- operators on integers -------------------------------------------------------------------------------------------


def on_floats(
    lift: Lifter, node: Node, op: str, operands: list[str], attrs: dict[str, Any], output: list[str]
) -> Result:
    """``Quantize(op(operands))``; ``output`` names the scale and zero point of the result, none for a float one."""
    name = node.outputs[0]
    if not all(operands):
        return None
    found = RULES["", op](lift, Node(op, operands, [name], domain=""), attrs, [lift.get(n) for n in operands])
    if not output or not output[0]:
        return found
    after = parameters(lift, output[0], output[1], lift.dtype(name))
    return quantized(lift, found, after, f"{name}.rounded") if isinstance(found, Value) else None


@rule("QLinearMatMul")
def q_linear_matmul(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    given = names(node, 8)
    operands = [float_of(lift, given[:3]), float_of(lift, given[3:6], along=-1)]
    return on_floats(lift, node, "MatMul", operands, {}, given[6:])


@rule("QLinearAdd", "QLinearMul", domain="com.microsoft")
def q_linear_binary(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    given = names(node, 8)
    operands = [float_of(lift, given[:3]), float_of(lift, given[3:6])]
    return on_floats(lift, node, node.op.removeprefix("QLinear"), operands, {}, given[6:])


@rule("QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu", domain="com.microsoft")
@rule("QLinearGlobalAveragePool", "QLinearAveragePool", domain="com.microsoft")
def q_linear_unary(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    given = names(node, 5)
    if attrs.get("channels_last"):
        return None
    op = node.op.removeprefix("QLinear")
    return on_floats(lift, node, op, [float_of(lift, given[:3])], attrs, given[3:])


@rule("QGemm", domain="com.microsoft")
def q_gemm(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    given = names(node, 9)
    operands = [float_of(lift, given[:3]), float_of(lift, given[3:6], along=0 if attrs.get("transB") else 1)]
    if given[6]:
        operands.append(integer_bias(lift, given[6], given[1:3], given[4:6]))
    return on_floats(lift, node, "Gemm", operands, attrs, given[7:])


def integer_bias(lift: Lifter, name: str, left: list[str], right: list[str]) -> str:
    """A name for the floats that a bias of sums stands for, "" where they are not known; ``left``, ``right``: scale and
    zero point of the operands.
    """
    x, weight, bias = parameters(lift, *left), parameters(lift, *right), lift.get(name)
    if x is None or weight is None or x.scale.ndim or not isinstance(bias, Constant) or bias.array.ndim != 1:
        return ""
    if weight.scale.size not in (1, bias.array.size):
        return ""
    # Named apart from the integers, which a bias that two layers share may have under several scales.
    known = lift.known(f"{name}.float", Opaque())
    lift.values[known] = Dequantized(known, bias.array, x.scale * weight.scale, np.zeros((), np.int32))
    return known
