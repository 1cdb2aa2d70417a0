"""Writes a graph as a standard ONNX file: foreign nodes as they came, native ones in operators of opset 17.

The decompositions use no operator whose signature changed between opset 17 and the newest, so a graph that also
holds foreign nodes of a newer opset keeps that opset.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.errors import GraphError, ModelError, UnsupportedModelError
from espalier.ir.graph import Graph, Node, TensorType
from espalier.ir.images import Window, aligned
from espalier.ir.ops import relative_buckets

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 17

# A protobuf message ends at 2 GiB; above this the tensors go to a file of their own.
_EXTERNAL_FROM = 1_800_000_000


def write(graph: Graph, path: str | os.PathLike[str]) -> Path:
    """Write ``graph`` to ``path`` and return the path. Raises as :func:`to_model`, and ModelError for an OS error.

    The file appears at once and whole, or not at all. Beyond 1.8 GB the tensors are written beside it, as
    ``<name>.data``.
    """
    import onnx

    target = Path(path)
    model = to_model(graph)
    external = sum(array.nbytes for array in graph.constants.values()) > _EXTERNAL_FROM
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            data = f"{target.name}.data"
            onnx.save_model(model, str(temporary), save_as_external_data=external, location=data if external else None)
            if external:
                os.replace(Path(folder) / data, target.parent / data)
            os.replace(temporary, target)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    return target


def to_model(graph: Graph) -> ModelProto:
    """``graph`` as an ``onnx.ModelProto``.

    Raises UnsupportedModelError when foreign nodes were written against an opset before 17, and GraphError for a
    native op that this module does not know or an input without a type.
    """
    from onnx import helper

    opsets = dict(graph.opsets)
    foreign = any(not node.is_native for node in graph.nodes)
    if foreign and opsets.get("", OPSET) < OPSET:
        raise UnsupportedModelError(
            f"{graph.name}: its ONNX nodes are of opset {opsets['']}, and native nodes are written in opset {OPSET}; "
            "convert the model with onnx.version_converter.convert_version first"
        )
    opsets[""] = max(OPSET, opsets.get("", OPSET)) if foreign else OPSET
    builder = _Builder(graph)
    for node in graph.nodes:
        builder.emit(node)
    named = {name for made in builder.nodes for name in made.input} | set(graph.outputs)
    ids = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    body = helper.make_graph(
        builder.nodes,
        graph.name or "graph",
        [_info(graph, name) for name in graph.inputs],
        [_info(graph, name) for name in graph.outputs],
        list(builder.tensors(named)),
    )
    model = helper.make_model(body, opset_imports=ids, producer_name="espalier")
    model.ir_version = max(8, helper.find_min_ir_version_for(ids, ignore_unknown=True))
    return model


def _info(graph: Graph, name: str) -> Any:
    from onnx import helper

    kind = graph.types.get(name)
    if kind is None:
        raise GraphError(f"{graph.name}: {name!r} has no type, so it cannot be written as an input or output")
    shape = None if kind.shape is None else [None if str(dim).startswith("?") else dim for dim in kind.shape]
    return helper.make_tensor_value_info(name, _element(kind.dtype), shape)


def _element(dtype: str) -> int:
    from onnx import TensorProto, helper

    if dtype in ("str", "string", "object"):
        return int(TensorProto.STRING)
    if dtype == "bfloat16":
        return int(TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class _Builder:
    """ONNX nodes and initializers in the making. A method that adds a node returns the name of its output."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self._extra: dict[str, np.ndarray] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._transposed: dict[str, str] = {}
        self._quantized: dict[tuple[str, str, str], str] = {}
        self._dynamic: dict[str, tuple[str, str, str]] = {}
        self._taken = {*graph.types, *graph.constants, *(name for node in graph.nodes for name in node.outputs)}

    def emit(self, node: Node) -> None:
        if node.proto is not None:
            self.nodes.append(node.proto)
            return
        writer = _WRITERS.get(node.op)
        if writer is None:
            raise GraphError(f"{self.graph.name}: the ONNX writer does not know {node.op!r} ({node.name})")
        writer(self, node, node.outputs[0])

    def add(self, op: str, *inputs: str, out: str = "", **attrs: Any) -> str:
        from onnx import helper

        out = out or self.fresh(op.lower())
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"{out}/{op}", **attrs))
        return out

    def fresh(self, stem: str) -> str:
        number = len(self._taken)
        while f"{stem}.{number}" in self._taken:
            number += 1
        name = f"{stem}.{number}"
        self._taken.add(name)
        return name

    def own(self, array: np.ndarray) -> str:
        """A constant that nothing else refers to."""
        name = self.fresh("const")
        self._extra[name] = array
        return name

    def const(self, value: Any, dtype: str) -> str:
        """A small constant; equal ones share a name."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.own(array)
        return self._shared[key]

    def transposed(self, name: str) -> str:
        """The name of a constant matrix, transposed."""
        if name not in self._transposed:
            self._transposed[name] = self.fresh(f"{name}.T")
        return self._transposed[name]

    def quantized(self, x: str, scale: str, zero: str) -> str:
        """``x`` quantised and dequantised. All readers of ``x`` with equal parameters share one pair of nodes."""
        # By value: every layer has constants of its own.
        scale, zero = (self._by_value(name) for name in (scale, zero))
        key = (x, scale, zero)
        if key not in self._quantized:
            integers = self.add("QuantizeLinear", *key)
            self._quantized[key] = self.add("DequantizeLinear", integers, scale, zero)
        return self._quantized[key]

    def _by_value(self, name: str) -> str:
        array = np.asarray(self.graph.constants[name])
        return self.const(array, array.dtype.name)

    def dynamic(self, x: str) -> tuple[str, str, str]:
        """Integers, scale and zero point of ``x``, from its own range; shared by all readers."""
        if x not in self._dynamic:
            from onnx import helper

            names = (self.fresh("quantized"), self.fresh("scale"), self.fresh("zero"))
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], list(names), name=f"{names[0]}/Quantize"))
            self._dynamic[x] = names
        return self._dynamic[x]

    def tensors(self, named: set[str]) -> Iterator[Any]:
        """An initializer for every constant that is named, made one by one so that copies do not pile up."""
        from onnx import numpy_helper

        for name, array in {**self.graph.constants, **self._extra}.items():
            if name in named:
                yield numpy_helper.from_array(np.asarray(array, order="C"), name)
        for name, twin in self._transposed.items():
            # A plan keeps weights by nonzeros; asarray makes them dense.
            yield numpy_helper.from_array(np.asarray(self.graph.constants[name]).T.copy(), twin)

    def type(self, name: str) -> TensorType:
        kind = self.graph.types.get(name)
        return kind if kind is not None else TensorType("float32", None)

    def index(self, name: str) -> str:
        """An integer value as int64, which every operator that counts or indexes takes."""
        return name if self.type(name).dtype == "int64" else self.add("Cast", name, to=_element("int64"))

    def scalar(self, value: float, like: str) -> str:
        """A constant of the element type of ``like``."""
        return self.const(value, self.type(like).dtype)


# --- one function per op: (builder, node, name of the output) ---------------------------------------------------------


def _positions(b: _Builder, node: Node, out: str) -> None:
    start = int(node.attrs.get("offset", 0))
    shape = b.add("Shape", node.inputs[0])
    columns = b.add("Gather", shape, b.const(1, "int64"), axis=0)
    stop = b.add("Add", columns, b.const(start, "int64"))
    numbers = b.add("Range", b.const(start, "int64"), stop, b.const(1, "int64"))
    b.add("Unsqueeze", numbers, b.const([0], "int64"), out=out)


def _positions_from_ids(b: _Builder, node: Node, out: str) -> None:
    padding = int(node.attrs["padding_idx"])
    equal = b.add("Equal", b.index(node.inputs[0]), b.const(padding, "int64"))
    mask = b.add("Cast", b.add("Not", equal), to=_element("int64"))
    count = b.add("CumSum", mask, b.const(1, "int64"))
    b.add("Add", b.add("Mul", count, mask), b.const(padding, "int64"), out=out)


def _embedding(b: _Builder, node: Node, out: str) -> None:
    b.add("Gather", node.inputs[0], b.index(node.inputs[1]), axis=0, out=out)


def _relative_bias(b: _Builder, node: Node, out: str) -> None:
    farthest = int(node.attrs["max_distance"])
    # From the farthest distance on, every key is in the last bucket, so a clipped distance finds its row in a table.
    distances = np.arange(-farthest, farthest + 1, dtype=np.int64)
    buckets = relative_buckets(distances, int(node.attrs["num_buckets"]), farthest)
    table = b.const(np.asarray(b.graph.constants[node.inputs[0]])[buckets], "float32")
    shape = b.add("Shape", node.inputs[1])
    zero, one = b.const(0, "int64"), b.const(1, "int64")
    columns = b.add("Range", zero, b.add("Gather", shape, one, axis=0), one)
    row = b.add("Unsqueeze", columns, b.const([0], "int64"))
    column = b.add("Unsqueeze", columns, b.const([1], "int64"))
    clipped = b.add("Clip", b.add("Sub", row, column), b.const(-farthest, "int64"), b.const(farthest, "int64"))
    found = b.add("Gather", table, b.add("Add", clipped, b.const(farthest, "int64")), axis=0)
    b.add("Unsqueeze", b.add("Transpose", found, perm=[2, 0, 1]), b.const([0], "int64"), out=out)


def _linear(b: _Builder, node: Node, out: str) -> None:
    x, weight = node.inputs[:2]
    bias = _optional(node, 2)
    product = b.add("MatMul", x, b.transposed(weight), out="" if bias else out)
    if bias:
        b.add("Add", product, bias, out=out)


def _qlinear(b: _Builder, node: Node, out: str) -> None:
    """QDQ for static activations; for those quantised per token DynamicQuantizeLinear and MatMulInteger.

    ONNX has no operator that quantises each token by itself: other runtimes take one range for the whole tensor, which
    is coarser.
    """
    x, weight, scale = node.inputs[:3]
    zero, bias = _optional(node, 3), _optional(node, 4)
    rows = b.graph.constants[weight].shape[0]
    if zero and b.graph.constants[zero].shape != b.graph.constants[scale].shape:
        scale, zero = (_per_row(b, name, rows) for name in (scale, zero))
    if node.attrs["activations"] == "static":
        # ONNX Runtime in its exact mode (session.x64quantprecision) fails on zero points that are left out or shared.
        zero = zero or b.own(np.zeros(b.graph.constants[scale].shape, np.int8))
        factor = b.add("DequantizeLinear", b.transposed(weight), scale, zero, axis=1)
        y = b.add("MatMul", b.quantized(x, node.inputs[5], node.inputs[6]), factor, out="" if bias else out)
    else:
        integers, x_scale, x_zero = b.dynamic(x)
        total = b.add(
            "Cast", b.add("MatMulInteger", integers, b.transposed(weight), x_zero, zero), to=_element("float32")
        )
        y = b.add("Mul", total, b.add("Mul", x_scale, scale), out="" if bias else out)
    if bias:
        b.add("Add", y, bias, out=out)


def _per_row(b: _Builder, name: str, rows: int) -> str:
    array = np.asarray(b.graph.constants[name])
    return b.const(np.broadcast_to(array, (rows,)), array.dtype.name)


def _fake_quantize(b: _Builder, node: Node, out: str) -> None:
    b.add("Identity", b.quantized(*node.inputs), out=out)


def _layer_norm(b: _Builder, node: Node, out: str) -> None:
    x, gamma = node.inputs[:2]
    b.add("LayerNormalization", x, gamma, _optional(node, 2), axis=-1, epsilon=float(node.attrs["epsilon"]), out=out)


def _gelu(b: _Builder, x: str, out: str) -> None:
    erf = b.add("Erf", b.add("Div", x, b.scalar(math.sqrt(2), x)))
    half = b.add("Mul", x, b.scalar(0.5, x))
    b.add("Mul", half, b.add("Add", erf, b.scalar(1, x)), out=out)


def _gelu_tanh(b: _Builder, x: str, out: str) -> None:
    cube = b.add("Mul", b.add("Mul", x, x), x)
    inner = b.add("Add", x, b.add("Mul", cube, b.scalar(0.044715, x)))
    tanh = b.add("Tanh", b.add("Mul", inner, b.scalar(math.sqrt(2 / math.pi), x)))
    half = b.add("Mul", x, b.scalar(0.5, x))
    b.add("Mul", half, b.add("Add", tanh, b.scalar(1, x)), out=out)


def _times_sigmoid(factor: float) -> Callable[[_Builder, str, str], None]:
    def write_it(b: _Builder, x: str, out: str) -> None:
        scaled = x if factor == 1 else b.add("Mul", x, b.scalar(factor, x))
        b.add("Mul", x, b.add("Sigmoid", scaled), out=out)

    return write_it


_ACTIVATIONS: dict[str, str | Callable[[_Builder, str, str], None]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _times_sigmoid(1),
    "quick_gelu": _times_sigmoid(1.702),
    "relu": "Relu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "erf": "Erf",
    "exp": "Exp",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "softplus": "Softplus",
    "elu": "Elu",
}


def _activation(b: _Builder, node: Node, out: str) -> None:
    kind = str(node.attrs["kind"])
    how = _ACTIVATIONS.get(kind)
    if how is None:
        raise GraphError(f"{b.graph.name}: the ONNX writer does not know the activation {kind!r} ({node.name})")
    if isinstance(how, str):
        b.add(how, node.inputs[0], out=out)
    else:
        how(b, node.inputs[0], out)


def _elementwise(b: _Builder, node: Node, out: str) -> None:
    b.add(node.op, *node.inputs, out=out)


def _attention(b: _Builder, node: Node, out: str) -> None:
    q, k, v = node.inputs[:3]
    key_mask, bias = _optional(node, 3), _optional(node, 4)
    heads = int(node.attrs["heads"])

    def split(x: str, perm: list[int]) -> str:
        apart = b.add("Reshape", x, b.const([0, 0, heads, -1], "int64"))
        return b.add("Transpose", apart, perm=perm)

    scaled = b.add("Mul", split(q, [0, 2, 1, 3]), b.scalar(float(node.attrs["scale"]), q))
    scores = b.add("MatMul", scaled, split(k, [0, 2, 3, 1]))
    if bias:
        scores = b.add("Add", scores, bias)
    if key_mask:
        kept = b.add("Cast", key_mask, to=_element("bool"))
        penalty = b.add("Where", kept, b.scalar(0, q), b.scalar(float(node.attrs["mask_value"]), q))
        scores = b.add("Add", scores, b.add("Unsqueeze", penalty, b.const([1, 2], "int64")))
    context = b.add("MatMul", b.add("Softmax", scores, axis=-1), split(v, [0, 2, 1, 3]))
    merged = b.add("Transpose", context, perm=[0, 2, 1, 3])
    shape = b.type(v).shape
    width = shape[-1] if shape and isinstance(shape[-1], int) else -1
    b.add("Reshape", merged, b.const([0, 0, width], "int64"), out=out)


def _select_token(b: _Builder, node: Node, out: str) -> None:
    b.add("Gather", node.inputs[0], b.const(int(node.attrs["index"]), "int64"), axis=1, out=out)


def _masked_mean(b: _Builder, node: Node, out: str) -> None:
    x, mask = node.inputs[0], _optional(node, 1)
    kind = _element(b.type(x).dtype)
    if mask:
        weights = b.add("Cast", mask, to=kind)
        count = b.add("ReduceSum", weights, b.const([1], "int64"), keepdims=1)
        kept = b.add("Mul", x, b.add("Unsqueeze", weights, b.const([2], "int64")))
    else:  # not ReduceMean, which takes its axes in another way from opset 18 on
        count = b.add("Cast", b.add("Gather", b.add("Shape", x), b.const(1, "int64"), axis=0), to=kind)
        kept = x
    total = b.add("ReduceSum", kept, b.const([1], "int64"), keepdims=0)
    b.add("Div", total, b.add("Max", count, b.scalar(float(node.attrs["epsilon"]), x)), out=out)


def _image_to_tokens(b: _Builder, node: Node, out: str) -> None:
    flat = b.add("Reshape", node.inputs[0], b.const([0, 0, -1], "int64"))
    b.add("Transpose", flat, perm=[0, 2, 1], out=out)


def _tokens_to_image(b: _Builder, node: Node, out: str) -> None:
    _image(b, node.inputs[0], int(node.attrs["rows"]), int(node.attrs["columns"]), out)


def _image(b: _Builder, x: str, rows: int, columns: int, out: str = "") -> str:
    planes = b.add("Transpose", x, perm=[0, 2, 1])
    return b.add("Reshape", planes, b.const([0, 0, rows, columns], "int64"), out=out)


def _after(window: Window) -> list[int]:
    """Rows below and columns on the right that the last outputs read beyond the edges; negative: that none reads."""
    sides = zip(_reads(window), window.source, window.before, strict=True)
    return [int(at.max()) + 1 - size - before for at, size, before in sides]


def _reads(window: Window) -> list[np.ndarray]:
    """``[outputs, taps]`` along each side: what every output reads, counted from where the first output begins."""
    sides = zip(window.result, window.stride, window.kernel, window.dilation, strict=True)
    return [np.arange(n)[:, None] * stride + np.arange(k) * dilation for n, stride, k, dilation in sides]


def _taps(b: _Builder, x: str, window: Window, align: int = 1) -> str:
    """``[B, rows, kernel rows, columns, kernel columns, F]``: what each tap reads, zeros beyond the edges.

    Gathered, as a convolution with a kernel of ones and zeros would make NaN of every infinity.
    """
    image = b.add("Reshape", x, b.const([0, *window.source, -1], "int64"))
    after = [max(0, n) for n in _after(window)]
    more = 0
    if align > 1:
        features = (b.type(x).shape or ("?",))[-1]
        if not isinstance(features, int):
            raise GraphError(f"{b.graph.name}: the ONNX writer must know the features of {x!r} to align them")
        more = aligned(features, align) - features
    if any((*window.before, *after, more)):
        image = b.add("Pad", image, b.const([0, *window.before, 0, 0, *after, more], "int64"))
    rows, columns = _reads(window)
    by_row = b.add("Gather", image, b.const(rows, "int64"), axis=1)
    return b.add("Gather", by_row, b.const(columns, "int64"), axis=3)


def _unfold(b: _Builder, node: Node, out: str) -> None:
    window = Window.of(node.attrs["window"])
    taps = _taps(b, node.inputs[0], window, int(node.attrs["align"]))
    by_pixel = b.add("Transpose", taps, perm=[0, 1, 3, 2, 4, 5])
    b.add("Reshape", by_pixel, b.const([0, window.pixels, -1], "int64"), out=out)


def _pool(b: _Builder, node: Node, out: str) -> None:
    window = Window.of(node.attrs["window"])
    largest = node.op == "MaxPool"
    after = _after(window)
    limits = zip(window.before, after, window.kernel, window.stride, strict=True)
    # ONNX Runtime refuses longer pads, and a pool makes as many outputs as fit.
    plain = all(before < kernel and -stride < end < kernel for before, end, kernel, stride in limits)
    pads = [*window.before, *(max(0, end) for end in after)]
    if not largest and (not plain or window.dilation != (1, 1)):  # AveragePool is dilated from opset 19 on
        _mean_of_taps(b, node, window, out)
        return
    image = _image(b, node.inputs[0], *window.source)
    if not plain:
        longer = [0, 0, *window.before, 0, 0, *after]
        image, pads = b.add("Pad", image, b.const(longer, "int64"), b.const(-np.inf, "float32")), [0] * 4
    shape: dict[str, Any] = {"kernel_shape": window.kernel, "strides": window.stride, "pads": pads}
    if largest:
        pooled = b.add("MaxPool", image, dilations=window.dilation, **shape)
    else:
        pooled = b.add("AveragePool", image, count_include_pad=int(node.attrs["count_edges"]), **shape)
    b.add("Transpose", b.add("Reshape", pooled, b.const([0, 0, -1], "int64")), perm=[0, 2, 1], out=out)


def _mean_of_taps(b: _Builder, node: Node, window: Window, out: str) -> None:
    total = b.add("ReduceSum", _taps(b, node.inputs[0], window), b.const([2, 4], "int64"), keepdims=0)
    count = np.full((*window.result, 1), window.taps, np.float32)
    if not node.attrs["count_edges"]:
        sides = zip(_reads(window), window.before, window.source, strict=True)
        rows, columns = (((at >= before) & (at < before + size)).sum(axis=1) for at, before, size in sides)
        count = np.maximum(rows[:, None] * columns, 1)[..., None]
    mean = b.add("Div", total, b.const(count, "float32"))
    b.add("Reshape", mean, b.const([0, window.pixels, -1], "int64"), out=out)


def _concat(b: _Builder, node: Node, out: str) -> None:
    b.add("Concat", *filter(None, node.inputs), axis=-1, out=out)


def _spread(b: _Builder, node: Node, out: str) -> None:
    token = b.add("Unsqueeze", node.inputs[0], b.const([1], "int64"))
    b.add("Expand", token, b.const([1, int(node.attrs["tokens"]), 1], "int64"), out=out)


def _l2_normalize(b: _Builder, node: Node, out: str) -> None:
    x = node.inputs[0]
    squares = b.add("ReduceSum", b.add("Mul", x, x), b.const([-1], "int64"), keepdims=1)
    norm = b.add("Max", b.add("Sqrt", squares), b.scalar(float(node.attrs["epsilon"]), x))
    b.add("Div", x, norm, out=out)


def _softmax(b: _Builder, node: Node, out: str) -> None:
    b.add("Softmax", node.inputs[0], axis=-1, out=out)


def _slice_features(b: _Builder, node: Node, out: str) -> None:
    x, squeeze = node.inputs[0], bool(node.attrs.get("squeeze", False))
    bounds = [b.const([int(node.attrs[end])], "int64") for end in ("start", "stop")]
    part = b.add("Slice", x, *bounds, b.const([-1], "int64"), out="" if squeeze else out)
    if squeeze:
        b.add("Squeeze", part, b.const([-1], "int64"), out=out)


def _cast(b: _Builder, node: Node, out: str) -> None:
    b.add("Cast", node.inputs[0], to=_element(str(node.attrs["dtype"])), out=out)


def _optional(node: Node, index: int) -> str:
    return node.inputs[index] if len(node.inputs) > index else ""


_WRITERS: dict[str, Callable[[_Builder, Node, str], None]] = {
    "Positions": _positions,
    "PositionsFromIds": _positions_from_ids,
    "Embedding": _embedding,
    "RelativeBias": _relative_bias,
    "Linear": _linear,
    "QLinear": _qlinear,
    "FakeQuantize": _fake_quantize,
    "LayerNorm": _layer_norm,
    "Activation": _activation,
    "Add": _elementwise,
    "Sub": _elementwise,
    "Mul": _elementwise,
    "Div": _elementwise,
    "Max": _elementwise,
    "Min": _elementwise,
    "Attention": _attention,
    "SelectToken": _select_token,
    "MaskedMean": _masked_mean,
    "ImageToTokens": _image_to_tokens,
    "TokensToImage": _tokens_to_image,
    "Unfold": _unfold,
    "MaxPool": _pool,
    "MeanPool": _pool,
    "Concat": _concat,
    "Spread": _spread,
    "L2Normalize": _l2_normalize,
    "Softmax": _softmax,
    "SliceFeatures": _slice_features,
    "Cast": _cast,
}
