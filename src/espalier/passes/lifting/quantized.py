"""Quantised values: scales and zero points, rounding in place of pairs of Q and DQ, and quantised linear layers."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.images import Window
from espalier.ir.quantization import QUANTIZED, dequantize, quantize
from espalier.passes.lifting import attention
from espalier.passes.lifting.embedding import embed
from espalier.passes.lifting.lifter import Lifter
from espalier.passes.lifting.values import (
    BF,
    BSF,
    SF,
    Constant,
    Dequantized,
    Dynamic,
    Factor,
    Product,
    Quantized,
    Rounding,
    Row,
    Rows,
    Scores,
    Unrounded,
    Value,
    View,
    rows,
    widened,
)


class Parameters(NamedTuple):
    """Scale (float32) and zero point (its type is that of the integers): numbers, or vectors along one axis."""

    scale: np.ndarray
    zero: np.ndarray

    @property
    def single(self) -> bool:
        """Whether they are one positive scale and one zero point for the whole tensor."""
        return not self.scale.ndim and not self.zero.ndim and bool(self.scale > 0)

    def same(self, other: Parameters) -> bool:
        """Whether both mean the same, integers included."""
        return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(self, other, strict=True))


def parameters(lift: Lifter, scale: str, zero: str, dtype: str = "unknown") -> Parameters | None:
    """Constant parameters by name; ``dtype`` is that of the integers, for where there is no zero point (``""``)."""
    factor, centre = lift.get(scale), lift.get(zero)
    if not isinstance(factor, Constant) or factor.array.dtype != np.float32 or not np.isfinite(factor.array).all():
        return None
    if zero and not isinstance(centre, Constant):
        return None
    missing = np.zeros((), "uint8" if dtype == "unknown" else dtype)
    offset = centre.array if isinstance(centre, Constant) else missing
    flat = [a.reshape(() if a.size == 1 else -1) for a in (factor.array, offset)]
    vectors = all(a.size == a.shape[-1] for a in (factor.array, offset) if a.ndim)
    return Parameters(*flat) if vectors else None


# --- values --------------------------------------------------------------------------------------------------------


def rounded(lift: Lifter, x: Value | None, found: Parameters, name: str) -> Value | None:
    """``x`` rounded to what its integers can say: FakeQuantize. Scores stay as they are, and remember it."""
    if isinstance(x, Scores):
        return replace(x, rounded=True)
    if isinstance(x, Unrounded):
        return x
    if not found.single:
        return None
    if isinstance(x, Row):
        return Row(dequantize(quantize(x.array, *found), *found), x.shape)
    if not isinstance(x, View) or x.base.integer:
        return None
    names = [_number(lift, number) for number in found]
    known = lift.rounded.get(x.base.name)
    if known is not None and known[1:] == tuple(names) and x.scale == 1.0:
        return x
    if x.base.layout not in (BSF, SF, BF):
        return None
    solid = lift.solid(x)
    inputs = [solid.name, *names]
    view = lift.emit("FakeQuantize", inputs, {}, replace(solid, name=""), axes=x.axes, name=name)
    lift.rounded[view.base.name] = Rounding(*inputs)
    return view


def quantized(lift: Lifter, x: Value | None, found: Parameters | None, name: str) -> Quantized | Constant | None:
    """The integers of ``x``."""
    if found is None or found.zero.dtype.name not in QUANTIZED:
        return None
    if isinstance(x, Constant):
        return Constant(name, quantize(x.array, *found)) if found.single else None
    value = rounded(lift, x, found, name)
    return None if value is None else Quantized(value, *found)


def dequantized(lift: Lifter, name: str, q: str, scale: str, zero: str, along: int = 1) -> Value | None:
    """What the integers ``q`` stand for under constant parameters. ``name`` is that float value's, if it has one."""
    integers = lift.get(q)
    if isinstance(integers, Quantized):
        found = parameters(lift, scale, zero, integers.zero.dtype.name)
        return integers.x if found is not None and found.same(Parameters(integers.scale, integers.zero)) else None
    constant = integers.table if isinstance(integers, Rows) else integers
    if not isinstance(constant, Constant) or constant.dtype not in (*QUANTIZED, "int32"):
        return None
    found = parameters(lift, scale, zero, constant.dtype)
    if found is None or found.zero.dtype.name != constant.dtype:
        return None
    if isinstance(integers, Rows):
        return _embedded(lift, name, integers, found)
    return _constant(name, constant.array, found, along)


def _constant(name: str, q: np.ndarray, found: Parameters, along: int) -> Dequantized | None:
    vectors = [a for a in found if a.ndim]
    if vectors and not -q.ndim <= along < q.ndim:
        return None
    along = along % q.ndim if vectors else 0
    fits = all(a.size == q.shape[along] for a in vectors)
    return Dequantized(name, q, *found, along) if fits else None


def _embedded(lift: Lifter, name: str, rows: Rows, found: Parameters) -> Value | None:
    """Rows of a quantised table: an embedding of the table that the integers stand for."""
    if found.scale.ndim or found.zero.ndim:
        return None
    table = Dequantized(f"{rows.table.name}.float", rows.table.array, *found)
    gather = Node("Gather", rows.node.inputs, [name], domain="", name=rows.node.name)
    return look_up(lift, gather, table, lift.attributes(rows.node).get("axis", 0))


def look_up(lift: Lifter, node: Node, table: Dequantized, along: int) -> Value | None:
    """``Gather(table, ids)``. The rows hold rounded values: rounding them again changes nothing."""
    view = embed(lift, node, table, along)
    found = Parameters(table.scale, table.zero)
    if isinstance(view, View) and found.single and table.q.dtype.name in QUANTIZED:
        lift.rounded[view.base.name] = Rounding(view.base.name, *(_number(lift, number) for number in found))
    return view


def float_of(lift: Lifter, operand: list[str], along: int = 1) -> str:
    """A name under which the float value of ``operand``, ``[q, scale, zero]``, is known; "" where it is not."""
    q, scale, zero = operand
    key = ("float", q, scale, zero)
    if key not in lift.derived:
        value = dequantized(lift, f"{q}.float", q, scale, zero, along)
        lift.derived[key] = "" if value is None else lift.known(f"{q}.float", value)
    return lift.derived[key]


def _number(lift: Lifter, value: np.ndarray) -> str:
    stem = "scale" if value.dtype == np.float32 else "zero"
    return lift.derive((value.dtype.name, value.item()), stem, lambda: value)


# --- linear layers ---------------------------------------------------------------------------------------------------


def linear(
    lift: Lifter, x: View, weight: Dequantized, transposed: bool, bias: str, name: str, factor: float = 1.0
) -> View | None:
    """A linear layer of rounded values and a quantised weight: QLinear; None where either is not quantised."""
    known = lift.rounded.get(x.base.name)
    if known is None or (bias and x.scale != 1.0):
        return None
    source = replace(x, base=replace(x.base, name=known.source))
    static = [known.scale, known.zero]
    return layer(lift, source, weight.scaled(np.float32(factor)), transposed, bias, static, name)


def layer(
    lift: Lifter, x: View, weight: Dequantized, transposed: bool, bias: str, static: list[str], name: str
) -> View | None:
    """QLinear of ``x``; ``static`` names the scale and zero point of x, and is empty for one of each per token."""
    q, rank = weight.q, weight.q.ndim
    if q.dtype.name not in QUANTIZED or rank < 2 or q.size != q.shape[-2] * q.shape[-1]:
        return None
    outputs, inputs = q.shape[-2:] if transposed else q.shape[:-3:-1]
    vectors = weight.scale.ndim or weight.zero.ndim
    if inputs != x.base.features or (vectors and weight.axis - rank != (-2 if transposed else -1)):
        return None

    def turned() -> np.ndarray:
        return q.reshape(q.shape[-2:]) if transposed else q.reshape(q.shape[-2:]).T

    def vector(kind: str, array: np.ndarray) -> str:
        return lift.derive((weight.name, kind, array.tobytes()), f"{weight.name}.{kind}", lambda: array)

    operands = [
        x.base.name,
        lift.derive((weight.name, "q", transposed), f"{weight.name}.q", turned),
        vector("scale", weight.scale),
        vector("zero", weight.zero) if weight.zero.any() else "",
        bias,
        *static,
    ]
    attrs = {"activations": "static" if static else "token"}
    tensor = replace(x.base, name="", features=outputs)
    view = lift.emit("QLinear", operands, attrs, tensor, axes=widened(x, outputs), name=name)
    return replace(view, scale=x.scale)


# --- products of integers --------------------------------------------------------------------------------------------


def combine(lift: Lifter, op: str, left: Value | None, right: Value | None, name: str) -> Value | None:
    """``Mul`` and ``Add`` with scales and integer products: their scales come in one by one, in any order."""
    if isinstance(right, Product) or (isinstance(right, Factor) and not isinstance(left, Product)):
        left, right = right, left
    if op == "Add" and isinstance(left, Product) and isinstance(right, Constant):
        return _biased(left, right)
    if op != "Mul" or not isinstance(left, Factor | Product):
        return None
    factor = Factor((), right.array) if isinstance(right, Constant) else right
    if not isinstance(factor, Factor) or (factor.constant is not None and factor.constant.dtype != np.float32):
        return None
    constants = [c for c in (left.constant, factor.constant) if c is not None]
    if any(c.size not in (1, *c.shape[-1:]) for c in constants) or len({c.size for c in constants} - {1}) > 1:
        return None
    flat = [c.reshape(() if c.size == 1 else -1) for c in constants]
    constant = flat[0] if len(flat) == 1 else np.multiply(*flat) if flat else None
    if isinstance(left, Factor):
        return Factor(left.scales + factor.scales, constant)
    missing = list(left.missing)
    for scale in factor.scales:
        if scale not in missing:
            return None
        missing.remove(scale)
    return _complete(lift, replace(left, missing=tuple(missing), constant=constant), name)


def _biased(product: Product, bias: Constant) -> Product | None:
    """Integers added to the sums before any scale."""
    array, right = bias.array, product.right
    if (
        not isinstance(right, Dequantized)
        or product.window is not None
        or product.bias is not None
        or product.constant is not None
    ):
        return None
    fits = array.dtype == np.int32 and array.ndim and array.size == array.shape[-1] == right.q.shape[-1]
    return replace(product, bias=array.reshape(-1)) if fits else None


def _complete(lift: Lifter, product: Product, name: str) -> Value | None:
    """The linear layer, or the attention, of a product that has all its scales; else the product as it is."""
    left, right, constant = product.left, product.right, product.constant
    if product.missing:
        return product
    if isinstance(right, Dynamic):
        alpha = 1.0 if constant is None else constant.item() if constant.size == 1 else 0.0
        return attention.matmul(lift, name, left.x, right.x, alpha) if alpha else None
    if product.window is not None:
        return _convolved(lift, product, product.window, name)
    x = rows(left.x)
    if constant is None or x is None or constant.size not in (1, right.q.shape[-1]):
        return product
    bias = "" if product.bias is None else lift.constant(name + ".bias", (product.bias * constant).astype(np.float32))
    if isinstance(left, Quantized):
        return linear(lift, x, right.scaled(constant / left.scale), False, bias, name)
    return layer(lift, x, right.scaled(constant), False, bias, [], name)


def _convolved(lift: Lifter, product: Product, window: Window, name: str) -> Value | None:
    from espalier.passes.lifting.convolutions import convolve

    left, right, constant = product.left, product.right, product.constant
    if constant is None:
        return product
    if constant.size != 1 or not isinstance(left.x, View) or not isinstance(right, Dequantized):
        return None
    factor, dynamic = constant.reshape(()), isinstance(left, Dynamic)
    weight = right.scaled(factor if isinstance(left, Dynamic) else factor / left.scale)
    return convolve(lift, left.x, weight, window, "", name, dynamic=dynamic)
