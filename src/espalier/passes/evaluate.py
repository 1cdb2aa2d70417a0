"""ONNX operators on NumPy arrays: for constant folding and for probing small subgraphs.

Only what exporters put around an encoder is here; :func:`evaluate` falls back on ``onnx.reference`` for the rest.
Semantics follow the opset version where versions differ (axes as attribute or input, Split, Softmax).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from espalier.errors import ModelError
from espalier.ir.graph import Node
from espalier.ir.quantization import QUANTIZED, dequantize, quantize

Array = np.ndarray
Maybe = np.ndarray | None
Attrs = Mapping[str, Any]
Rule = Callable[[list[Maybe], Attrs, int], Any]

RULES: dict[str, Rule] = {}


class EvaluationError(Exception):
    """The node is not a pure function of NumPy arrays, or its inputs do not fit."""


def attributes(node: Node) -> dict[str, Any]:
    """Attributes of a foreign node as Python values (tensors as arrays); ``node.attrs`` of one without proto."""
    if node.proto is None:
        return dict(node.attrs)
    return attribute_values(node.proto)


def attribute_values(proto: Any) -> dict[str, Any]:
    """Attributes of a NodeProto as Python values. What cannot be decoded stays an AttributeProto."""
    import onnx

    from espalier.onnx.tensors import from_proto

    values: dict[str, Any] = {}
    for attribute in proto.attribute:
        kind = attribute.type
        if kind == onnx.AttributeProto.TENSOR:
            try:
                values[attribute.name] = from_proto(attribute.t, (), {})
            except ModelError:
                values[attribute.name] = attribute
        elif kind == onnx.AttributeProto.STRING:
            values[attribute.name] = attribute.s.decode(errors="replace")
        elif kind in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT):
            values[attribute.name] = attribute.i if kind == onnx.AttributeProto.INT else attribute.f
        elif kind in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            values[attribute.name] = list(attribute.ints if kind == onnx.AttributeProto.INTS else attribute.floats)
        elif kind == onnx.AttributeProto.STRINGS:
            values[attribute.name] = [s.decode(errors="replace") for s in attribute.strings]
        else:
            values[attribute.name] = attribute
    return values


def evaluate(node: Node, attrs: Attrs, inputs: list[Maybe], opset: int) -> list[Array]:
    """Outputs of one ONNX node. Raises EvaluationError."""
    rule = RULES.get(node.op) if node.domain == "" else None
    if rule is None:
        return _reference(node, inputs, opset)
    try:
        with np.errstate(all="ignore"):
            result = rule(inputs, attrs, opset)
    except (ValueError, TypeError, IndexError, AttributeError, KeyError, OverflowError, ZeroDivisionError) as error:
        raise EvaluationError(f"{node.op}: {error}") from error
    outputs = result if isinstance(result, list) else [result]
    return [np.asarray(o) for o in outputs]


def _reference(node: Node, inputs: list[Maybe], opset: int) -> list[Array]:
    if node.proto is None or node.domain != "" or node.op.startswith("Random") or node.op in ("If", "Loop", "Scan"):
        raise EvaluationError(f"{node.op} is not evaluated here")
    import onnx
    from onnx.reference import ReferenceEvaluator

    names = [name for name, value in zip(node.inputs, inputs, strict=True) if value is not None]
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:]
    proto.input.extend(node.inputs)
    try:
        run = ReferenceEvaluator(proto, opsets={"": opset})
        feeds = {name: value for name, value in zip(node.inputs, inputs, strict=True) if value is not None}
        results = run.run(None, {name: feeds[name] for name in names})
    except Exception as error:  # the reference implementation raises whatever its NumPy code meets
        raise EvaluationError(f"{node.op}: {error}") from error
    return [np.asarray(r) for r in results]


def need(value: Maybe) -> Array:
    if value is None:
        raise EvaluationError("a required input is absent")
    return value


def _rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for op in ops:
            RULES[op] = rule
        return rule

    return register


def axes_of(inputs: list[Maybe], attrs: Attrs, index: int = 1) -> list[int] | None:
    """``axes`` as an attribute (older opsets) or an input; None when absent."""
    if "axes" in attrs:
        return [int(a) for a in attrs["axes"]]
    if len(inputs) > index and inputs[index] is not None:
        return [int(a) for a in np.asarray(inputs[index]).ravel()]
    return None


_UNARY: dict[str, Callable[[Array], Any]] = {
    "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log, "Tanh": np.tanh, "Abs": np.abs, "Neg": np.negative,
    "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint, "Not": np.logical_not, "IsNaN": np.isnan, "Sign": np.sign,
    "Reciprocal": lambda x: (1 / x).astype(x.dtype), "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Sigmoid": lambda x: (1 / (1 + np.exp(-x))).astype(x.dtype),
    "Softplus": lambda x: np.logaddexp(x, 0).astype(x.dtype),
    "Sin": np.sin, "Cos": np.cos, "Identity": lambda x: x, "Softsign": lambda x: x / (1 + np.abs(x)),
    "BitwiseNot": np.invert,
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Pow": lambda x, y: np.power(x, y).astype(x.dtype),
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
    "BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "MatMul": np.matmul,
}  # fmt: skip
for _op, _function in _UNARY.items():
    RULES[_op] = lambda i, a, o, f=_function: f(need(i[0]))  # type: ignore[misc]
for _op, _pair in _BINARY.items():
    RULES[_op] = lambda i, a, o, f=_pair: f(need(i[0]), need(i[1]))  # type: ignore[misc]

erf = np.vectorize(math.erf, otypes=[np.float64])


@_rule("Erf")
def _erf(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    return np.asarray(erf(x)).astype(x.dtype) if x.size else x


@_rule("Gelu")
def _gelu(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    if a.get("approximate", "none") == "tanh":
        return np.asarray(x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).astype(x.dtype)
    return np.asarray(x * 0.5 * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


@_rule("Div")
def _div(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x, y = need(i[0]), need(i[1])
    if x.dtype.kind in "iu":
        return np.asarray(
            np.trunc(x / y) if x.dtype == object else np.sign(x) * np.sign(y) * (abs(x) // abs(y))
        ).astype(x.dtype)
    return np.asarray(x / y)


@_rule("Mod")
def _mod(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.asarray(np.fmod(need(i[0]), need(i[1])) if a.get("fmod") else np.mod(need(i[0]), need(i[1])))


@_rule("Min", "Max", "Sum")
def _many(i: list[Maybe], a: Attrs, opset: int) -> Array:
    raise EvaluationError("replaced below")


RULES["Min"] = lambda i, a, o: _fold(np.minimum, i)
RULES["Max"] = lambda i, a, o: _fold(np.maximum, i)
RULES["Sum"] = lambda i, a, o: _fold(np.add, i)


def _fold(function: Callable[[Array, Array], Any], inputs: list[Maybe]) -> Array:
    result = need(inputs[0])
    for other in inputs[1:]:
        result = function(result, need(other))
    return result


@_rule("Clip")
def _clip(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    low = i[1] if len(i) > 1 else a.get("min")
    high = i[2] if len(i) > 2 else a.get("max")
    if low is not None:
        x = np.maximum(x, np.asarray(low, x.dtype))
    if high is not None:
        x = np.minimum(x, np.asarray(high, x.dtype))
    return x


@_rule("Where")
def _where(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.where(need(i[0]), need(i[1]), need(i[2]))


@_rule("Cast")
def _cast(i: list[Maybe], a: Attrs, opset: int) -> Array:
    from espalier.onnx.tensors import dtype_of

    dtype = dtype_of(a["to"])
    if dtype is None or dtype.hasobject:
        raise EvaluationError(f"Cast to element type {a['to']}")
    return need(i[0]).astype(dtype)


def _parameters(i: list[Maybe], a: Attrs) -> tuple[Array, Array]:
    """Scale and zero point of Q or DQ, shaped to broadcast over the first operand."""
    x, scale = need(i[0]), need(i[1])
    zero = i[2] if len(i) > 2 else None
    if zero is None:
        zero = np.zeros((), x.dtype if x.dtype.kind in "iu" else np.uint8)
    if a.get("block_size") or a.get("output_dtype") or scale.dtype != np.float32 or zero.dtype.name not in _QUANTIZED:
        raise EvaluationError("a quantisation of blocks or of other types than 8 bit integers")
    if scale.size == 1 and zero.size == 1:
        return scale.reshape(()), zero.reshape(())
    along = [1] * x.ndim
    along[a.get("axis", 1)] = -1
    return scale.reshape(along), zero.reshape(along)


_QUANTIZED = (*QUANTIZED, "int32")


@_rule("QuantizeLinear")
def _quantize_linear(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return quantize(need(i[0]), *_parameters(i, a))


@_rule("DequantizeLinear")
def _dequantize_linear(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return dequantize(need(i[0]), *_parameters(i, a))


@_rule("CastLike")
def _cast_like(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return need(i[0]).astype(need(i[1]).dtype)


@_rule("Constant")
def _constant(i: list[Maybe], a: Attrs, opset: int) -> Array:
    for key, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if key in a:
            return np.asarray(a[key], dtype)
    if "value" not in a or not isinstance(a["value"], np.ndarray):
        raise EvaluationError("a Constant of strings or of a sparse tensor")
    return np.asarray(a["value"])


@_rule("ConstantOfShape")
def _constant_of_shape(i: list[Maybe], a: Attrs, opset: int) -> Array:
    dims = [int(d) for d in need(i[0]).ravel()]
    if math.prod(dims) > 1 << 24:
        raise EvaluationError("ConstantOfShape is too big")
    value = a.get("value", np.zeros(1, np.float32))
    if not isinstance(value, np.ndarray) or value.size != 1:
        raise EvaluationError("ConstantOfShape of an odd value")
    return np.full(dims, value.ravel()[0], value.dtype)


@_rule("Shape")
def _shape(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.asarray(need(i[0]).shape[slice(a.get("start", 0), a.get("end"))], np.int64)


@_rule("Size")
def _size(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.asarray(need(i[0]).size, np.int64)


@_rule("Range")
def _range(i: list[Maybe], a: Attrs, opset: int) -> Array:
    start, stop, step = (need(v).item() for v in i)
    if step == 0 or abs((stop - start) / step) > 1 << 24:
        raise EvaluationError("Range is too big")
    return np.arange(start, stop, step, dtype=need(i[0]).dtype)


def reshape_dims(shape: list[Any], target: list[int], allowzero: bool) -> list[Any]:
    return [shape[k] if d == 0 and not allowzero else d for k, d in enumerate(target)]


@_rule("Reshape")
def _reshape(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    target = [int(d) for d in need(i[1]).ravel()]
    return x.reshape(reshape_dims(list(x.shape), target, bool(a.get("allowzero", 0))))


@_rule("Flatten")
def _flatten(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    axis = a.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


@_rule("Transpose")
def _transpose(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return need(i[0]).transpose(a.get("perm"))


@_rule("Unsqueeze")
def _unsqueeze(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.expand_dims(need(i[0]), tuple(axes_of(i, a) or ()))


@_rule("Squeeze")
def _squeeze(i: list[Maybe], a: Attrs, opset: int) -> Array:
    axes = axes_of(i, a)
    return np.squeeze(need(i[0]), None if axes is None else tuple(axes))


@_rule("Expand")
def _expand(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    shape = np.broadcast_shapes(x.shape, tuple(int(d) for d in need(i[1])))
    return np.broadcast_to(x, shape)


@_rule("Tile")
def _tile(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.tile(need(i[0]), need(i[1]))


@_rule("Concat")
def _concat(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.concatenate([need(v) for v in i], a["axis"])


@_rule("Gather")
def _gather(i: list[Maybe], a: Attrs, opset: int) -> Array:
    return np.take(need(i[0]), need(i[1]), a.get("axis", 0))


@_rule("GatherElements")
def _gather_elements(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x, index = need(i[0]), need(i[1])
    axis = a.get("axis", 0) % x.ndim
    trimmed = x[tuple(slice(None) if k == axis else slice(n) for k, n in enumerate(index.shape))]
    return np.take_along_axis(trimmed, index, axis)


@_rule("GatherND")
def _gather_nd(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x, index = need(i[0]), need(i[1])
    if a.get("batch_dims", 0):
        raise EvaluationError("GatherND with batch_dims")
    return np.asarray(x[tuple(np.moveaxis(index, -1, 0))])


@_rule("Slice")
def _slice(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    if "starts" in a:
        starts, ends, axes, steps = a["starts"], a["ends"], a.get("axes"), None
    else:
        starts, ends = need(i[1]).ravel(), need(i[2]).ravel()
        axes = i[3] if len(i) > 3 else None
        steps = i[4] if len(i) > 4 else None
    cut = [slice(None)] * x.ndim
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = int(k if axes is None else axes[k])
        step = int(1 if steps is None else steps[k])
        stop: int | None = int(end)
        if step < 0 and int(end) < -x.shape[axis]:
            stop = None
        cut[axis] = slice(int(start), stop, step)
    return x[tuple(cut)]


@_rule("Split")
def _split(i: list[Maybe], a: Attrs, opset: int) -> list[Array]:
    x = need(i[0])
    axis = a.get("axis", 0)
    sizes = a.get("split") or (i[1] if len(i) > 1 else None)
    if sizes is None:
        raise EvaluationError("Split into equal parts")
    return list(np.split(x, np.cumsum(sizes)[:-1], axis))


@_rule("CumSum")
def _cumsum(i: list[Maybe], a: Attrs, opset: int) -> Array:
    if a.get("exclusive") or a.get("reverse"):
        raise EvaluationError("CumSum that is exclusive or reverse")
    x = need(i[0])
    return np.cumsum(x, int(need(i[1]).ravel()[0]), dtype=x.dtype)


@_rule("Trilu")
def _trilu(i: list[Maybe], a: Attrs, opset: int) -> Array:
    k = int(np.asarray(i[1]).ravel()[0]) if len(i) > 1 and i[1] is not None else 0
    return np.triu(need(i[0]), k) if a.get("upper", 1) else np.tril(need(i[0]), k)


@_rule("OneHot")
def _one_hot(i: list[Maybe], a: Attrs, opset: int) -> Array:
    index, depth, values = need(i[0]), int(need(i[1]).ravel()[0]), need(i[2])
    if depth > 1 << 16:
        raise EvaluationError("OneHot is too deep")
    axis = a.get("axis", -1) % (index.ndim + 1)
    hot = np.moveaxis(np.asarray(index)[..., None] % depth == np.arange(depth), -1, axis)
    return np.asarray(np.where(hot, values[1], values[0]))


@_rule("Softmax")
def _softmax(i: list[Maybe], a: Attrs, opset: int) -> Array:
    x = need(i[0])
    axis = a.get("axis", -1 if opset >= 13 else 1)
    if opset < 13 and axis % x.ndim != x.ndim - 1:
        raise EvaluationError("Softmax over flattened axes")
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def _reducer(function: Callable[..., Any]) -> Rule:
    def rule(i: list[Maybe], a: Attrs, opset: int) -> Array:
        x = need(i[0])
        axes = axes_of(i, a)
        if not axes and a.get("noop_with_empty_axes"):
            return x
        return np.asarray(function(x, axis=tuple(axes) if axes else None, keepdims=bool(a.get("keepdims", 1)))).astype(
            x.dtype
        )

    return rule


RULES["ReduceSum"] = _reducer(np.sum)
RULES["ReduceMean"] = _reducer(np.mean)
RULES["ReduceMax"] = _reducer(np.max)
RULES["ReduceMin"] = _reducer(np.min)
RULES["ReduceProd"] = _reducer(np.prod)
RULES["ReduceL2"] = _reducer(lambda x, **k: np.sqrt(np.square(x).sum(**k)))
RULES["ReduceSumSquare"] = _reducer(lambda x, **k: np.square(x).sum(**k))
