"""Arithmetic of shapes: small integer tensors whose entries are expressions of the extents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.passes.evaluate import EvaluationError
from espalier.passes.lifting import images
from espalier.passes.lifting.lifter import INTEGERS, Lifter, Result, rule
from espalier.passes.lifting.values import Constant, Extents, Value, View
from espalier.passes.symbolic import ONE, Expr

MANY = 64
"""Entries. Longer tensors are data, not shapes."""


def of(entries: list[Any], shape: tuple[int, ...]) -> Extents:
    array = np.empty(len(entries), object)
    array[:] = entries
    return Extents(array.reshape(shape))


def cast(value: Extents, target: str) -> Extents | None:
    if target in INTEGERS and all(isinstance(e, Expr) for e in value.array.ravel()):
        return value
    return None


def reshape(value: Extents, target: list[Expr]) -> Extents | None:
    dims = [d.number for d in target]
    if any(d is None for d in dims):
        return None
    sizes = [value.array.shape[k] if d == 0 else int(d or 0) for k, d in enumerate(dims)]
    try:
        return Extents(value.array.reshape(sizes))
    except ValueError:
        return None


def squeeze(value: Extents, where: list[int] | None, op: str) -> Extents | None:
    try:
        if op == "Unsqueeze":
            return Extents(np.expand_dims(value.array, tuple(where or ())))
        return Extents(np.squeeze(value.array, None if where is None else tuple(where)))
    except ValueError:
        return None


def expand(value: Extents, target: list[Expr]) -> Extents | None:
    dims = [d.number for d in target]
    if any(d is None or d > MANY for d in dims):
        return None
    try:
        shape = np.broadcast_shapes(value.array.shape, tuple(int(d or 0) for d in dims))
    except ValueError:
        return None
    return Extents(np.broadcast_to(value.array, shape)) if int(np.prod(shape)) <= MANY else None


def gather(value: Extents, numbers: list[int], shape: list[int], along: int) -> Extents | None:
    try:
        return Extents(np.asarray(np.take(value.array, np.array(numbers, np.int64).reshape(shape), along), object))
    except (IndexError, ValueError):
        return None


def cut(value: Extents, starts: list[Expr], ends: list[Expr], axes: list[int]) -> Extents | None:
    slices = [slice(None)] * value.array.ndim
    for begin, end, k in zip(starts, ends, axes, strict=True):
        if begin.number is None or end.number is None:
            return None
        slices[k] = slice(begin.number, end.number)
    return Extents(value.array[tuple(slices)])


def reverse(value: Extents, starts: list[Expr], ends: list[Expr], steps: list[int]) -> Extents | None:
    if value.array.ndim == 1 and steps == [-1] and starts[0] == -1 and (ends[0].number or 0) < -value.array.size:
        return Extents(value.array[::-1])
    return None


def split(value: Extents, sizes: list[int] | None, count: int) -> list[Value | None] | None:
    if value.array.ndim != 1:
        return None
    sizes = sizes or [1] * count
    if sum(sizes) != value.array.size or len(sizes) != count:
        return None
    return [Extents(part) for part in np.split(value.array, np.cumsum(sizes)[:-1])]


@rule("Shape")
def shape_rule(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    shape = lift.shape(node.inputs[0])
    if shape is None:
        return None
    part = shape[slice(attrs.get("start", 0), attrs.get("end"))]
    return of(list(part), (len(part),))


@rule("Size")
def size_rule(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    shape = lift.shape(node.inputs[0])
    if shape is None:
        return None
    total = ONE
    for size in shape:
        total = total * size
    return of([total], ())


def _arrays(lift: Lifter, inputs: list[Value | None]) -> list[np.ndarray] | None:
    """All inputs as object arrays, when at least one holds extents and the others are small constants."""
    if not any(isinstance(v, Extents) for v in inputs):
        return None
    arrays = []
    for value in inputs:
        if isinstance(value, Extents):
            arrays.append(value.array)
        elif isinstance(value, Constant) and value.array.size <= MANY:
            if value.array.dtype == bool:
                arrays.append(of([bool(b) for b in value.array.ravel()], value.array.shape).array)
            elif value.array.dtype.name in INTEGERS:
                arrays.append(of([Expr.of(int(n)) for n in value.array.ravel()], value.array.shape).array)
            else:
                return None
        else:
            return None
    return arrays


def elementwise(lift: Lifter, op: str, inputs: list[Value | None]) -> Extents | None:
    """Add, Sub, Mul, Div, Equal, Where, Min and Max of extents; None if an entry stays undecided."""
    function = _FUNCTIONS.get(op)
    arrays = _arrays(lift, inputs)
    if function is None or arrays is None:
        return None
    try:
        spread = np.broadcast_arrays(*arrays)
        entries = [function(*entry) for entry in zip(*(a.ravel() for a in spread), strict=True)]
    except (EvaluationError, ValueError, TypeError):
        return None
    return of(entries, spread[0].shape)


def _div(a: Expr, b: Expr) -> Expr:
    quotient = a.over(b) if b.terms else None
    if quotient is None:
        x, y = a.number, b.number
        if x is None or y is None or y == 0 or x < 0 or y < 0:
            raise EvaluationError("a quotient that is not exact")
        return Expr.of(x // y)
    return quotient


def _equal(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if isinstance(a, Expr) and isinstance(b, Expr) and not a.never_equals(b):
        raise EvaluationError("two extents may or may not be equal")
    return False


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, bool):
        raise EvaluationError("an undecided condition")
    return a if condition else b


def _extreme(sign: int) -> Callable[..., Any]:
    def function(*entries: Expr) -> Expr:
        best = entries[0]
        for other in entries[1:]:
            difference = (other - best) * sign
            number = difference.number
            constant = dict(difference.terms).get((), 0)
            others = [c for m, c in difference.terms if m]
            if number is not None:
                best = other if number > 0 else best
            elif all(c > 0 for c in others) and constant + sum(others) >= 0:
                best = other
            elif not (all(c < 0 for c in others) and constant + sum(others) <= 0):
                raise EvaluationError("two extents whose order is unknown")
        return best

    return function


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _div,
    "Equal": _equal,
    "Where": _where,
    "Max": _extreme(1),
    "Min": _extreme(-1),
}


@rule("Concat")
def concat(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    arrays = _arrays(lift, inputs)
    if arrays is None:
        return images.concat(lift, inputs, attrs.get("axis", -1), node.outputs[0])
    if any(a.ndim != 1 for a in arrays):
        return None
    return Extents(np.concatenate(arrays))


@rule("ReduceProd")
def reduce_prod(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    value = inputs[0]
    if not isinstance(value, Extents) or value.array.ndim != 1:
        return None
    total = ONE
    for entry in value.array:
        total = total * entry
    return of([total], (1,) if attrs.get("keepdims", 1) else ())


@rule("ConstantOfShape")
def constant_of_shape(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    dims = lift.ints(inputs[0])
    fill = attrs.get("value", np.zeros(1, np.float32))
    if not isinstance(fill, np.ndarray) or fill.size != 1:
        return None
    if dims is None or fill.dtype.name not in INTEGERS or len(dims) > 1 or (dims and dims[0] > MANY):
        return None
    count = dims[0] if dims else 1
    return of([Expr.of(int(fill.ravel()[0]))] * count, tuple(dims))


@rule("Min", "Max", "Equal")
def compare(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    known = elementwise(lift, node.op, inputs)
    if known is not None or node.op == "Equal" or len(inputs) != 2:
        return known
    for one, other in (inputs, inputs[::-1]):
        limit = images.number(other)
        if isinstance(one, View) and limit is not None:
            return images.bounded(lift, one, node.op, limit, node.outputs[0])
    return None
