"""ONNX file -> :class:`espalier.ir.graph.Graph`, without copying the weights.

The file is memory-mapped. A walk over its protobuf encoding replaces the bytes of every large initializer by
nothing, so that only the small rest is parsed; the weights become read-only views into the map.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from espalier.errors import ModelFormatError, ModelNotFoundError
from espalier.ir.graph import Dim, Graph, Node, TensorType
from espalier.onnx import tensors, wire

LARGE = 4096
"""Raw data of at least this many bytes stays in the file."""

# Field numbers of onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9


def read(path: str | Path) -> Graph:
    """Read an ONNX model of any exporter; the file is never written to.

    Constants may be views of the memory-mapped file, so the file must not change while the graph is in use.
    Raises ModelNotFoundError when the file or its external data is missing, ModelFormatError when it is not a
    model, is truncated, corrupt or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelNotFoundError(f"{path} {what}; expected the path of an .onnx file")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise ModelFormatError(f"{path} is empty; expected an ONNX model")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read(path, data)
    except ModelFormatError as error:
        raise ModelFormatError(f"{path}: {error}") from error


def _read(path: Path, data: mmap.mmap) -> Graph:
    import onnx
    from google.protobuf.message import DecodeError

    stripped, large = _strip(data)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(stripped)
    except (DecodeError, RecursionError) as error:
        raise ModelFormatError(f"not an ONNX model: {error}") from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelFormatError("not an ONNX model: it has no graph; was the file written completely?")
    if not model.opset_import:
        raise ModelFormatError("not an ONNX model: it names no operator set (opset_import)")
    if model.functions:
        model = _inline(model)
    folders = list(dict.fromkeys([path.parent, path.resolve().parent]))
    constants = _constants(model.graph, large, data, folders)
    return _graph(model, constants)


def _strip(data: mmap.mmap) -> tuple[bytes, dict[str, tuple[int, list[int], int, int]]]:
    """The model without the raw data of its large initializers, and where those are.

    The second result maps a name to (element type, dims, offset, length), offset in bytes of ``data``.
    """
    view = memoryview(data)
    large: dict[str, tuple[int, list[int], int, int]] = {}
    try:
        pieces: list[bytes | memoryview] = []
        for field, kind, begin, at, end in wire.fields(view, 0, len(view)):
            if field == MODEL_GRAPH and kind == wire.BYTES:
                inner = _strip_graph(view, at, end, large)
                pieces += [wire.tag(MODEL_GRAPH, sum(map(len, inner))), *inner]
            else:
                pieces.append(view[begin:end])
        if sum(map(len, pieces)) >= 1 << 31:
            raise ModelFormatError("more than 2 GiB of the model is not initializers; such models cannot be read")
        return b"".join(pieces), large
    finally:
        pieces = []
        view.release()


def _strip_graph(
    view: memoryview, start: int, stop: int, large: dict[str, tuple[int, list[int], int, int]]
) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    copied = start  # everything before this offset is in pieces
    for field, kind, begin, at, end in wire.fields(view, start, stop):
        if field != GRAPH_INITIALIZER or kind != wire.BYTES or end - at < LARGE:
            continue
        entry = _tensor(view, at, end)
        if entry is None:
            continue
        name, head, found = entry
        if name in large:
            raise ModelFormatError(f"initializer {name!r} is stored twice")
        large[name] = found
        pieces += [view[copied:begin], wire.tag(GRAPH_INITIALIZER, sum(map(len, head))), *head]
        copied = end
    pieces.append(view[copied:stop])
    return pieces


def _tensor(
    view: memoryview, start: int, stop: int
) -> tuple[str, list[bytes | memoryview], tuple[int, list[int], int, int]] | None:
    """Name, encoding without raw data, and (type, dims, offset, length) of a tensor; None without large raw data."""
    name, element, dims = "", 0, list[int]()
    raw: tuple[int, int] | None = None
    head: list[bytes | memoryview] = []
    for field, kind, begin, at, end in wire.fields(view, start, stop):
        if field == TENSOR_RAW and kind == wire.BYTES:
            raw = (at, end - at)
            continue
        head.append(view[begin:end])
        if field == TENSOR_NAME and kind == wire.BYTES:
            try:
                name = bytes(view[at:end]).decode()
            except UnicodeDecodeError as error:
                raise ModelFormatError(f"an initializer's name at byte {at} is not UTF-8") from error
        elif field == TENSOR_TYPE and kind == wire.VARINT:
            element = at
        elif field == TENSOR_DIMS and kind == wire.VARINT:
            dims.append(wire.signed(at))
        elif field == TENSOR_DIMS and kind == wire.BYTES:
            while at < end:
                value, at = wire.varint(view, at, end)
                dims.append(wire.signed(value))
    if raw is None or raw[1] < LARGE or not name:
        return None
    return name, head, (element, dims, *raw)


def _inline(model: Any) -> Any:
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelFormatError(f"the model's local functions cannot be inlined: {error}") from error


def _constants(
    graph: Any, large: dict[str, tuple[int, list[int], int, int]], data: mmap.mmap, folders: list[Path]
) -> dict[str, np.ndarray]:
    constants: dict[str, np.ndarray] = {}
    maps: dict[Path, Any] = {}
    for tensor in graph.initializer:
        if tensor.name in constants:
            raise ModelFormatError(f"initializer {tensor.name!r} is stored twice")
        if tensor.name in large:
            constants[tensor.name] = tensors.from_bytes(
                tensor.name, *large[tensor.name][:2], data, *large[tensor.name][2:]
            )
        else:
            constants[tensor.name] = tensors.from_proto(tensor, folders, maps)
    for sparse in graph.sparse_initializer:
        constants[sparse.values.name] = _dense(sparse, folders, maps)
    return constants


def _dense(sparse: Any, folders: list[Path], maps: dict[Path, Any]) -> np.ndarray:
    """A sparse initializer as the dense tensor that it stands for."""
    name = sparse.values.name
    values = tensors.from_proto(sparse.values, folders, maps)
    indices = tensors.from_proto(sparse.indices, folders, maps)
    if indices.dtype != np.int64:
        raise ModelFormatError(f"sparse initializer {name!r} has indices of type {indices.dtype}; expected int64")
    dims = list(sparse.dims)
    count = tensors.count_of(name, dims)
    # A tiny file may claim a huge dense tensor; no real model is this sparse.
    if count > max(1 << 24, 4096 * values.size):
        raise ModelFormatError(f"sparse initializer {name!r} claims shape {dims} with only {values.size} stored values")
    if indices.ndim == 2 and dims and indices.shape[1] == len(dims):
        if ((indices < 0) | (indices >= np.array(dims))).any():
            raise ModelFormatError(f"sparse initializer {name!r} has an index outside its shape {dims}")
        indices = np.ravel_multi_index(tuple(indices.T), dims)
    if indices.shape != values.shape or values.ndim != 1 or ((indices < 0) | (indices >= count)).any():
        raise ModelFormatError(f"sparse initializer {name!r}: indices and values do not fit its shape {dims}")
    dense = np.zeros(count, values.dtype)
    dense[indices] = values
    dense.flags.writeable = False
    return dense.reshape(dims)


def _graph(model: Any, constants: dict[str, np.ndarray]) -> Graph:
    graph = model.graph
    opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
    types = _types(model)
    for name, array in constants.items():
        types[name] = TensorType(array.dtype.name, tuple(array.shape))
    inputs = [value.name for value in graph.input if value.name not in constants]
    nodes: list[Node] = []
    made = set(inputs) | set(constants)
    if len(inputs) != len(set(inputs)):
        raise ModelFormatError("two inputs of the model have the same name")
    for proto in graph.node:
        if not all(isinstance(text, str) for text in (proto.op_type, proto.domain, proto.name)):
            raise ModelFormatError(f"a node's operator, domain or name is not text: {proto.op_type!r}")
        for name in proto.input:
            if name and name not in made:
                raise ModelFormatError(
                    f"node {proto.name or proto.op_type!r} reads {name!r}, "
                    "which no input, initializer or earlier node makes"
                )
        for name in proto.output:
            if name and name in made:
                raise ModelFormatError(f"the value {name!r} is made twice; an ONNX graph assigns each name once")
            if name:
                made.add(name)
                types.setdefault(name, TensorType("unknown", None))
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        _check_signature(proto, domain, opsets.get(domain, 0))
        nodes.append(
            Node(proto.op_type, list(proto.input), list(proto.output), domain=domain, name=proto.name, proto=proto)
        )
    outputs = [value.name for value in graph.output]
    for name in outputs:
        if name not in made:
            raise ModelFormatError(f"the model's output {name!r} is made by no node")
    for name in inputs:
        types.setdefault(name, TensorType("unknown", None))
    return Graph(graph.name, inputs, outputs, nodes, constants, types, opsets)


def _check_signature(proto: Any, domain: str, version: int) -> None:
    """Raise ModelFormatError for an operator with an input too few or too many, or an attribute of another type.

    Unknown operators and attributes pass: ONNX Runtime decides about them.
    """
    import onnx

    if not onnx.defs.has(proto.op_type, domain) or version < 1:
        return
    try:
        schema = onnx.defs.get_schema(proto.op_type, version, domain)
    except onnx.defs.SchemaError:  # newer than the operator set, or removed from it
        return
    count = len(proto.input)
    if not schema.min_input <= count <= schema.max_input:
        raise ModelFormatError(
            f"node {proto.name or proto.op_type!r}: {proto.op_type} takes {schema.min_input} to "
            f"{min(schema.max_input, 1 << 16)} inputs, got {count}"
        )
    for attribute in proto.attribute:
        known = schema.attributes.get(attribute.name)
        wanted: Any = None if known is None else known.type
        if wanted is not None and wanted.value != attribute.type:
            raise ModelFormatError(
                f"node {proto.name or proto.op_type!r}: attribute {attribute.name!r} of {proto.op_type} must be of "
                f"type {wanted.name}, got type {attribute.type}"
            )


def _types(model: Any) -> dict[str, TensorType]:
    """Declared and inferred types by value name. Unnamed extents become ``?<number>``."""
    import onnx.shape_inference

    graph = model.graph
    try:
        # Large initializers have no data here; inference reads only their type and shape.
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError):
        # The declared types are all there is then.
        inferred = graph
    types: dict[str, TensorType] = {}
    unknown = 0
    for value in [*inferred.value_info, *graph.value_info, *inferred.output, *graph.output, *graph.input]:
        found, unknown = _type(value.type, unknown)
        if found is not None and (found.shape is not None or value.name not in types):
            types[value.name] = found
    return types


def _type(proto: Any, unknown: int) -> tuple[TensorType | None, int]:
    kind = proto.WhichOneof("value")
    if kind is None:
        return None, unknown
    if kind != "tensor_type":
        return TensorType(kind.removesuffix("_type"), None), unknown
    tensor = proto.tensor_type
    dtype = tensors.dtype_of(tensor.elem_type)
    name = "unknown" if dtype is None else dtype.name
    if not tensor.HasField("shape"):
        return TensorType(name, None), unknown
    shape: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            shape.append(dim.dim_value)
        elif dim.dim_param:
            shape.append(dim.dim_param)
        else:
            shape.append(f"?{unknown}")
            unknown += 1
    return TensorType(name, tuple(shape)), unknown
