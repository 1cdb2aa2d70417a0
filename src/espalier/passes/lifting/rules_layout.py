"""Operators that move elements: Reshape, Transpose, Squeeze, Slice, Gather, Split and their like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.quantization import QUANTIZED
from espalier.passes.lifting import extents, quantized
from espalier.passes.lifting.axes import FEATURE, TOKEN, Axes, axis, extent, reshape, resolve
from espalier.passes.lifting.embedding import embed
from espalier.passes.lifting.lifter import FLOATS, Lifter, Result, rule
from espalier.passes.lifting.values import (
    BF,
    BS,
    BSF,
    Constant,
    Dequantized,
    Extents,
    Masked,
    OneHot,
    Product,
    Row,
    Rows,
    Scores,
    Tensor,
    Value,
    View,
)
from espalier.passes.symbolic import ONE, Expr

Laid = View | Scores | Masked


def with_axes(value: Laid, axes: Axes) -> Value:
    return replace(value, axes=axes)


@rule("Identity", "Dropout")
def identity(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    if any(lift.consumers.get(name) or name in lift.graph.outputs for name in node.outputs[1:]):
        return None  # Dropout's mask is wanted too
    if node.op == "Dropout" and len(inputs) > 2 and inputs[2] is not None:
        training = inputs[2]
        if not isinstance(training, Constant) or training.array.any():
            return None
    value = inputs[0]
    return value if isinstance(value, Laid | Extents | Row | OneHot | Constant) else None


@rule("Cast", "CastLike")
def cast(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value = inputs[0]
    source, target = lift.dtype(node.inputs[0]), lift.dtype(node.outputs[0])
    if isinstance(value, Extents):
        return extents.cast(value, target)
    if isinstance(value, View) and value.base.integer:
        # A narrower integer would wrap ids that a wider one holds.
        return value if target in ("int32", "int64") and source in ("int32", "int64") else None
    if isinstance(value, Laid | Row) and target in FLOATS and source in FLOATS:
        return value
    if isinstance(value, OneHot) and target in FLOATS:
        return value
    if isinstance(value, Product) and target == "float32":
        return value
    return None


@rule("Reshape")
def reshaped(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value, target = inputs[0], lift.exprs(inputs[1])
    if target is None:
        return None
    if isinstance(value, Extents):
        return extents.reshape(value, target)
    shape = lift.shape(node.inputs[0])
    if shape is None:
        return None
    dims = resolve(shape, target, bool(attrs.get("allowzero", 0)))
    if dims is None:
        return None
    if isinstance(value, OneHot) and dims[-1] == value.depth:
        axes = reshape(value.ids.axes, dims[:-1])
        return None if axes is None else OneHot(replace(value.ids, axes=axes), value.depth)
    return _regroup(value, dims)


def _regroup(value: Value | None, dims: list[Expr]) -> Value | None:
    if isinstance(value, Row) and dims and dims[-1] == value.array.size:
        return Row(value.array, dims)
    if not isinstance(value, Laid):
        return None
    axes = reshape(value.axes, dims)
    return None if axes is None else with_axes(value, axes)


@rule("Flatten")
def flatten(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    shape = lift.shape(node.inputs[0])
    if shape is None or not isinstance(inputs[0], Laid):
        return None
    cut = attrs.get("axis", 1)
    cut += len(shape) if cut < 0 else 0
    outer, inner = ONE, ONE
    for size in shape[:cut]:
        outer = outer * size
    for size in shape[cut:]:
        inner = inner * size
    return _regroup(inputs[0], [outer, inner])


@rule("Transpose")
def transpose(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value = inputs[0]
    if not isinstance(value, Laid | Dequantized):
        return None
    rank = value.q.ndim if isinstance(value, Dequantized) else len(value.axes)
    perm = attrs.get("perm") or list(range(rank))[::-1]
    if sorted(perm) != list(range(rank)):
        return None
    if isinstance(value, Dequantized):
        return value.transposed(node.outputs[0], perm)
    return with_axes(value, tuple(value.axes[p] for p in perm))


@rule("Unsqueeze", "Squeeze")
def squeeze(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value = inputs[0]
    where = attrs.get("axes") or (lift.ints(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else None)
    if isinstance(value, Extents):
        return extents.squeeze(value, where, node.op)
    shape = lift.shape(node.inputs[0])
    if shape is None or not isinstance(value, Laid | Row | OneHot):
        return None
    if isinstance(value, OneHot):
        return None
    if node.op == "Unsqueeze":
        if where is None:
            return None
        rank = len(shape) + len(where)
        new = {a % rank for a in where}
        rest = iter(range(len(shape)))
        order = [None if k in new else next(rest) for k in range(rank)]
    else:
        if where is None:
            if any(s.number is None for s in shape):
                return None
            where = [k for k, s in enumerate(shape) if s == 1]
        gone = {a % len(shape) for a in where}
        if any(shape[a] != 1 for a in gone):
            return None
        order = [k for k in range(len(shape)) if k not in gone]
    if isinstance(value, Row):
        return (
            Row(value.array, [ONE if k is None else shape[k] for k in order])
            if order and order[-1] == len(shape) - 1
            else None
        )
    moved = with_axes(value, tuple(() if k is None else value.axes[k] for k in order))
    return _without_feature(lift, node.outputs[0], moved)


def _without_feature(lift: Lifter, name: str, value: Value) -> Value:
    """A token tensor of one feature whose feature axis was squeezed away, as a native value of that shape."""
    if not isinstance(value, View) or value.base.integer or value.base.features != 1 or value.scale != 1.0:
        return value
    base = value.base
    if base.layout != BSF or value.axes != base.axes()[:-1]:
        return value
    source = next((n for n in reversed(lift.nodes) if n.outputs == [base.name] and n.op == "SliceFeatures"), None)
    inputs, attrs = [base.name], {"start": 0, "stop": 1, "squeeze": True}
    if source is not None:
        inputs, attrs = list(source.inputs), {**source.attrs, "squeeze": True}
    return lift.emit("SliceFeatures", inputs, attrs, Tensor("", BS, base.batch, base.tokens), name=name)


@rule("Expand")
def expand(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value, target = inputs[0], lift.exprs(inputs[1])
    if target is None:
        return None
    if isinstance(value, Extents):
        return extents.expand(value, target)
    shape = lift.shape(node.inputs[0])
    if shape is None:
        return None
    if isinstance(value, Row):
        return Row(value.array, target) if len(target) >= len(shape) and target[-1] in (1, value.array.size) else None
    if isinstance(value, Laid) and len(target) <= len(shape):
        tail = shape[len(shape) - len(target) :]
        if all(t == 1 or t == s for t, s in zip(target, tail, strict=True)):
            return value
    return None


@rule("Slice")
def sliced(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value = inputs[0]
    if "starts" in attrs:
        starts = [Expr.of(n) for n in attrs["starts"]]
        ends = [Expr.of(n) for n in attrs["ends"]]
        axes, steps = attrs.get("axes"), None
    else:
        first, last = lift.exprs(inputs[1]), lift.exprs(inputs[2])
        if first is None or last is None:
            return None
        starts, ends = first, last
        axes = lift.ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else None
        steps = lift.ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else None
    if steps is not None and any(s != 1 for s in steps):
        return extents.reverse(value, starts, ends, steps) if isinstance(value, Extents) else None
    axes = list(range(len(starts))) if axes is None else axes
    if isinstance(value, Extents):
        return extents.cut(value, starts, ends, axes)
    if isinstance(value, Constant):
        return _table_rows(lift, node, value, starts, ends, axes)
    if not isinstance(value, View):
        return None
    result: Value | None = value
    for begin, end, k in zip(starts, ends, axes, strict=True):
        if not isinstance(result, View):
            return None
        result = _slice_axis(lift, node, result, begin, end, k % len(value.axes))
    return result


def _slice_axis(lift: Lifter, node: Node, value: View, begin: Expr, end: Expr, k: int) -> Value | None:
    size = extent(value.axes[k])
    first, last = begin.number, end.number
    full = end == size or (last is not None and last >= (size.number if size.number is not None else 1 << 31))
    if first == 0 and full:
        return value
    if first is None:
        return None
    if len(value.axes[k]) == 1 and value.axes[k][0].label == FEATURE and size.number is not None:
        if last is None and not full:
            return None
        start = max(first + size.number, 0) if first < 0 else first
        stop = size.number if full or last is None else last + size.number if last < 0 else min(last, size.number)
        return features(lift, value, k, start, stop, False, node.outputs[0])
    if last is not None and last == first + 1 and first >= 0:
        return _token(lift, value, k, first, True, node.outputs[0])
    return None


def _table_rows(
    lift: Lifter, node: Node, value: Constant, starts: list[Expr], ends: list[Expr], axes: list[int]
) -> Value | None:
    """``table[offset : offset + S]``: the position embedding without a Gather."""
    array = value.array
    shape = list(array.shape)
    if array.dtype.name not in FLOATS or array.ndim not in (2, 3) or (array.ndim == 3 and shape[0] != 1):
        return None
    moved = [(s, e) for s, e, a in zip(starts, ends, axes, strict=True) if a % array.ndim == array.ndim - 2]
    rest = [
        (s, e, shape[a % array.ndim])
        for s, e, a in zip(starts, ends, axes, strict=True)
        if a % array.ndim != array.ndim - 2
    ]
    if len(moved) != 1 or any(s != 0 or e.number is None or e.number < n for s, e, n in rest):
        return None
    offset, tokens = moved[0][0].number, moved[0][1] - moved[0][0]
    if offset is None or offset < 0 or tokens.number is not None:
        return None
    from espalier.passes.lifting.embedding import position_rows

    return position_rows(lift, node.outputs[0], value, offset, tokens, array.ndim)


def features(lift: Lifter, value: View, k: int, start: int, stop: int, squeeze: bool, name: str) -> Value | None:
    """Features ``start:stop`` of axis ``k``, which must run over the outermost part of all features."""
    base = value.base
    atom = value.axes[k][0]
    size = atom.size.number
    if base.integer or base.layout not in (BSF, BF) or size is None or not 0 <= start < stop <= size:
        return None
    if size * atom.stride != base.features:
        return None
    solid = lift.solid(value)
    count = stop - start
    inner = count * atom.stride
    tensor = replace(solid, name="", features=inner)
    squeeze = squeeze and count == 1
    keep = axis(FEATURE, count, atom.stride)
    axes = tuple(keep if j == k else one for j, one in enumerate(value.axes))
    if squeeze:
        axes = axes[:k] + axes[k + 1 :]
    attrs = {"start": start * atom.stride, "stop": stop * atom.stride, "squeeze": False}
    canonical = tensor.axes()
    view = lift.emit("SliceFeatures", [solid.name], attrs, tensor, axes=axes, name=name)
    return _without_feature(lift, name, view) if squeeze and inner == 1 and axes == canonical[:-1] else view


def _token(lift: Lifter, value: View, k: int, index: int, keep: bool, name: str) -> Value | None:
    """One token: axis ``k`` must run over all of them."""
    base = value.base
    one = value.axes[k]
    if base.integer or base.layout != BSF or len(one) != 1 or one[0].label != TOKEN or one[0].size != base.tokens:
        return None
    solid = lift.solid(value)
    tensor = Tensor("", BF, base.batch, ONE, base.features)
    axes = value.axes[:k] + (((),) if keep else ()) + value.axes[k + 1 :]
    return lift.emit("SelectToken", [solid.name], {"index": index}, tensor, axes=axes, name=name)


@rule("Gather")
def gather(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    data, index = inputs[0], inputs[1]
    along = attrs.get("axis", 0)
    numbers = lift.ints(index)
    if isinstance(data, Extents):
        shape = lift.shape(node.inputs[1])
        if numbers is None or shape is None:
            return None
        return extents.gather(data, numbers, [int(s.number or 0) for s in shape], along)
    if isinstance(data, Constant):
        if isinstance(data, Dequantized):
            return quantized.look_up(lift, node, data, along)
        # What integers stand for is known where they are dequantised.
        return Rows(node, data) if data.dtype in QUANTIZED else embed(lift, node, data, along)
    if not isinstance(data, View) or numbers is None or len(numbers) != 1:
        return None
    rank = len(lift.shape(node.inputs[1]) or [])
    k = along % len(data.axes)
    number = numbers[0]
    if rank > 1 or len(data.axes[k]) != 1:
        return None
    if data.axes[k][0].label == FEATURE:
        size = data.axes[k][0].size.number or 0
        number += size if number < 0 else 0
        return features(lift, data, k, number, number + 1, rank == 0, node.outputs[0])
    return _token(lift, data, k, number, rank == 1, node.outputs[0]) if number >= 0 else None


@rule("Split")
def split(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value = inputs[0]
    sizes = attrs.get("split") or (lift.ints(inputs[1]) if len(inputs) > 1 else None)
    if isinstance(value, Extents):
        return extents.split(value, sizes, len(node.outputs))
    if not isinstance(value, View):
        return None
    k = attrs.get("axis", 0) % len(value.axes)
    size = extent(value.axes[k]).number
    if size is None or len(value.axes[k]) != 1 or value.axes[k][0].label != FEATURE:
        return None
    if sizes is None:
        each = -(-size // len(node.outputs))
        sizes = [min(each, size - each * n) for n in range(len(node.outputs))]
    if sum(sizes) != size or len(sizes) != len(node.outputs):
        return None
    starts = np.cumsum([0, *sizes])
    return [
        features(lift, value, k, int(starts[n]), int(starts[n + 1]), False, node.outputs[n]) for n in range(len(sizes))
    ]


@rule("OneHot")
def one_hot(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    ids, depth, values = inputs[0], lift.ints(inputs[1]), inputs[2]
    if isinstance(depth, list) and len(depth) == 1 and isinstance(ids, View) and ids.base.integer:
        last = attrs.get("axis", -1) in (-1, len(ids.axes))
        if last and isinstance(values, Constant) and values.array.ravel().tolist() == [0, 1]:
            return OneHot(ids, depth[0])
    return None
