"""Plan files (``.espalier``): the steps of a session with their weights by nonzeros.

A plan is a safetensors file, so its arrays are memory-mapped and any safetensors reader can list them. Its
``__metadata__`` holds ``espalier`` (the version of the format), ``espalier.program`` (the steps as JSON) and
``espalier.sha256`` (over the program, and over every tensor's name, type, shape and bytes). Nothing in it depends on
the machine: packing for the instruction set happens on load.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from espalier.compiler.matrices import SparseConstant, SparseIntegers
from espalier.errors import GraphError, ModelFormatError, ModelNotFoundError
from espalier.files import replacing
from espalier.hf.safetensors import MAX_HEADER
from espalier.ir.graph import Graph, Node, TensorType
from espalier.ir.stored import ScaledTable, StoredMatrix
from espalier.ir.verify import verify
from espalier.passes.partition import NativeSegment, OrtSegment, Placed, Program, Step

PLAN_VERSION = "1"
_DENSE_ABOVE = 0.6
"""Above this share of nonzeros a weight is stored dense, ready to be mapped."""
_SMALL_TABLE = 64 * 1024
"""Tables with fewer entries than this are stored as they are: rounding them saves nothing."""
_ALIGNMENT = 64
_MOST_INTEGERS = 2**30
"""Entries of an integer weight: far beyond any model's, and few enough to be made dense while loading."""
_ROLES = {("Linear", 1): "weight", ("QLinear", 1): "integers", ("Embedding", 0): "table"}
"""What an operand is stored as, by operation and place; all others are plain arrays."""

_SPARSE: dict[str, tuple[str, ...]] = {
    "counts": ("uint32",),
    "gaps": ("uint8",),
    "low": ("uint16",),
    "middle": ("uint8",),
    "top": ("uint8",),
}
_INTEGERS: dict[str, tuple[str, ...]] = {
    "counts": ("uint32",),
    "gaps": ("uint8",),
    "values": ("int8", "uint8"),
    "zero": ("int8", "uint8"),
}
_SCALED: dict[str, tuple[str, ...]] = {"integers": ("int8", "int16"), "scales": ("float32",)}
"""The arrays that the compact forms of constants consist of, with their types."""

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
_CODES = {name: code for code, name in _DTYPES.items()}


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_plan(program: Program, path: str | os.PathLike[str], *, exact: bool = False) -> Path:
    """Write ``program`` to ``path``, in one step: an interrupted run leaves no half-written file.

    Linear weights are stored bit for bit. Large embedding tables are rounded to 16-bit integers with a scale per row
    (error at most max|row| / 65534) unless ``exact``.
    """
    writer = _Writer(exact)
    steps = [writer.step(step) for step in program.steps]
    description = {
        "name": program.name,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "types": {name: _type_json(kind) for name, kind in program.types.items()},
        "constants": {name: writer.array(array) for name, array in program.constants.items()},
        "steps": steps,
    }
    return _write(Path(path), json.dumps(description, separators=(",", ":")), writer.tensors)


class _Writer:
    """Collects tensors; a constant that several graphs share is stored once."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.tensors: dict[str, np.ndarray] = {}
        self._known: dict[int, tuple[Any, dict[str, Any]]] = {}

    def add(self, array: np.ndarray) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = array
        return name

    def array(self, array: Any) -> dict[str, Any]:
        plain = np.asarray(array)
        if plain.dtype.name not in _CODES:
            raise GraphError(f"a constant of type {plain.dtype} cannot be stored in a plan")
        return {"form": "array", "data": self.add(np.ascontiguousarray(plain).reshape(plain.shape))}

    def step(self, step: Step) -> dict[str, Any]:
        if isinstance(step, OrtSegment):
            model = step.model if isinstance(step.model, bytes) else Path(step.model).read_bytes()
            return {
                "kind": "onnxruntime",
                "model": self.add(np.frombuffer(model, np.uint8)),
                "inputs": step.inputs,
                "outputs": step.outputs,
                "whole": step.whole,
                "nodes": [[node.op, node.name, node.why] for node in step.nodes],
            }
        graph = step.graph
        roles: dict[str, set[str]] = {}
        zeros: dict[str, Any] = {}
        for node in graph.nodes:
            for at, name in enumerate(node.inputs):
                roles.setdefault(name, set()).add(_ROLES.get((node.op, at), "array"))
            if node.op == "QLinear":
                zeros[node.inputs[1]] = graph.constants.get([*node.inputs, ""][3])
        constants = {}
        for name, array in graph.constants.items():
            if id(array) not in self._known:
                (role,) = roles[name] if len(roles.get(name, ())) == 1 else ("array",)
                self._known[id(array)] = (array, self._constant(array, role, zeros.get(name)))
            constants[name] = self._known[id(array)][1]
        return {
            "kind": "native",
            "exact_padding": step.exact_padding,
            "graph": {
                "name": graph.name,
                "inputs": graph.inputs,
                "outputs": graph.outputs,
                "types": {name: _type_json(kind) for name, kind in graph.types.items()},
                "nodes": [[n.op, n.inputs, n.outputs, n.attrs, n.name, n.why] for n in graph.nodes],
                "constants": constants,
            },
        }

    def _constant(self, array: Any, role: str, zero: Any) -> dict[str, Any]:
        if role == "weight" and array.ndim == 2 and array.dtype == np.float32:
            sparse = _compress(array)
            if sparse is not None:
                return {"form": "sparse", "shape": list(sparse.shape), **self._parts(sparse, _SPARSE)}
        if role == "integers":
            integers = SparseIntegers.of(np.asarray(array), zero)
            if integers is not None:
                return {"form": "integers", "shape": list(integers.shape), **self._parts(integers, _INTEGERS)}
        rounded = role == "table" and not self.exact and array.dtype == np.float32 and array.size >= _SMALL_TABLE
        if isinstance(array, ScaledTable):
            return {"form": "scaled", **self._parts(array, _SCALED)}
        if rounded and np.isfinite(np.asarray(array)).all():
            return {"form": "scaled", **self._parts(ScaledTable.of(np.asarray(array)), _SCALED)}
        return self.array(array)

    def _parts(self, stored: StoredMatrix, parts: dict[str, tuple[str, ...]]) -> dict[str, str]:
        return {part: self.add(np.ascontiguousarray(getattr(stored, part))) for part in parts}


def _compress(array: Any) -> SparseConstant | None:
    """The nonzeros of a weight, or None when there are too many."""
    from espalier import _native

    if isinstance(array, SparseConstant):
        return array
    plain = np.asarray(array)
    matrix = _native.compress(plain if plain.flags.aligned else plain.copy())
    return SparseConstant.of(matrix) if matrix.nonzeros <= _DENSE_ABOVE * max(1, plain.size) else None


def _write(path: Path, description: str, tensors: dict[str, np.ndarray]) -> Path:
    # Wide elements first, so that every array is aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, int(name[1:])))
    entries: dict[str, Any] = {}
    at = 0
    for name in order:
        array = tensors[name]
        entries[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    digest = _digest(description, entries, (memoryview(_bytes(tensors[name])) for name in order))
    metadata = {"espalier": PLAN_VERSION, "espalier.program": description, "espalier.sha256": digest}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            file.write(_bytes(tensors[name]))
    return path


def _bytes(array: np.ndarray) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _digest(description: str, entries: dict[str, Any], data: Any) -> str:
    digest = hashlib.sha256(description.encode())
    digest.update(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
    for block in data:
        digest.update(block)
    return digest.hexdigest()


def _type_json(kind: TensorType) -> list[Any]:
    return [kind.dtype, None if kind.shape is None else list(kind.shape)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_plan(path: str | os.PathLike[str]) -> Program:
    """Open a plan. Arrays are views of the memory-mapped file.

    Raises ModelNotFoundError, or ModelFormatError when the file is no plan, of another version, truncated or corrupt.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path} does not exist; expected an .espalier plan") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise ModelFormatError(f"{path} is empty; compile the model again") from error
    description, tensors = _open(path, mapped)
    try:
        program = _program(json.loads(description), tensors)
        for step in program.steps:
            if isinstance(step, NativeSegment):
                verify(step.graph)
        _check_flow(program)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, GraphError) as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(
            f"{path} is a plan whose program cannot be read ({type(error).__name__}: {error}); compile the model again"
        ) from error
    return program


def _check_flow(program: Program) -> None:
    """Every value is made before it is read, with the type that its reader expects. Raises ValueError."""
    if len(set(program.inputs)) != len(program.inputs):
        raise ValueError("two inputs have the same name")
    known = {*program.inputs, *program.constants}
    for step in program.steps:
        ends = step.graph if isinstance(step, NativeSegment) else step
        for name in ends.inputs:
            if name not in known:
                raise ValueError(f"a step reads {name!r}, which no input, constant or earlier step makes")
            if (
                isinstance(step, NativeSegment)
                and name in program.inputs
                and program.types.get(name) != step.graph.types.get(name)
            ):
                raise ValueError(f"the program and a step disagree on the type of input {name!r}")
        known.update(ends.outputs)
    missing = [name for name in [*program.inputs, *program.outputs] if name not in known or name not in program.types]
    if missing:
        raise ValueError(f"{missing[0]!r} is named by the program, but not made or not typed")


def _open(path: Path, mapped: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
    """The program's JSON and the tensors, checked against the checksum."""

    def bad(what: str) -> ModelFormatError:
        return ModelFormatError(f"{path} is not a usable plan: {what}; compile the model again")

    if len(mapped) < 8:
        raise bad(f"expected at least 8 bytes, got {len(mapped)}")
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if length > min(len(mapped) - 8, MAX_HEADER):
        raise bad(f"its header claims {length} bytes of {len(mapped) - 8}; the file is truncated or corrupt")
    try:
        header = json.loads(mapped[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__")
        version, description, checksum = (
            str(metadata[key]) for key in ("espalier", "espalier.program", "espalier.sha256")
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(f"its header cannot be read ({type(error).__name__}: {error})") from error
    if version != PLAN_VERSION:
        raise bad(f"it is of version {version}, this release reads version {PLAN_VERSION}")
    data = mapped[8 + length :]
    tensors: dict[str, np.ndarray] = {}
    at = 0
    for name, entry in header.items():
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            shape = tuple(int(extent) for extent in entry["shape"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad(f"tensor {name!r} is described wrongly ({type(error).__name__}: {error})") from error
        count = 1
        for extent in shape:
            count *= extent
        if begin != at or min(shape, default=0) < 0 or end - begin != count * dtype.itemsize or end > len(data):
            raise bad(f"tensor {name!r} does not fit the file; it is truncated or corrupt")
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
        at = end
    if at != len(data):
        raise bad(f"it has {len(data)} bytes of data, expected {at}")
    if _digest(description, header, [data.data]) != checksum:
        raise bad("its checksum does not match; the file is corrupt")
    return description, tensors


def _program(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> Program:
    return Program(
        str(description["name"]),
        _names(description["inputs"]),
        _names(description["outputs"]),
        {name: _type(kind) for name, kind in description["types"].items()},
        [_step(step, tensors) for step in description["steps"]],
        {name: np.asarray(_stored(entry, tensors)) for name, entry in description["constants"].items()},
    )


def _step(step: dict[str, Any], tensors: dict[str, np.ndarray]) -> Step:
    if step["kind"] == "onnxruntime":
        nodes = [Placed(str(op), str(name), str(why)) for op, name, why in step["nodes"]]
        model = tensors[step["model"]].tobytes()
        return OrtSegment(model, _names(step["inputs"]), _names(step["outputs"]), nodes, bool(step["whole"]))
    if step["kind"] != "native":
        raise ValueError(f"unknown kind of step {step['kind']!r}")
    stored = step["graph"]
    nodes_ = [
        Node(str(op), _names(inputs), _names(outputs), dict(attrs), name=str(name), why=str(why[0]) if why else "")
        for op, inputs, outputs, attrs, name, *why in stored["nodes"]
    ]
    # The dialect's constants are arrays to every reader; a stored matrix is one in all that readers ask of it.
    constants: dict[str, Any] = {name: _stored(entry, tensors) for name, entry in stored["constants"].items()}
    types = {name: _type(kind) for name, kind in stored["types"].items()}
    graph = Graph(str(stored["name"]), _names(stored["inputs"]), _names(stored["outputs"]), nodes_, constants, types)
    return NativeSegment(graph, bool(step["exact_padding"]))


def _stored(entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> np.ndarray | StoredMatrix:
    form = entry["form"]
    if form == "array":
        return tensors[entry["data"]]
    if form == "scaled":
        integers, scales = _read_parts(entry, tensors, _SCALED)
        if integers.ndim != 2 or scales.shape != (len(integers),):
            raise ValueError("a rounded table has parts of the wrong shape")
        return ScaledTable(integers, scales)
    if form not in ("sparse", "integers"):
        raise ValueError(f"unknown form of constant {form!r}")
    rows, columns = (int(extent) for extent in entry["shape"])
    parts = _read_parts(entry, tensors, _SPARSE if form == "sparse" else _INTEGERS)
    if not (0 < rows < 2**31 and 0 < columns <= 65536) or parts[0].shape != (rows,):
        raise ValueError("a sparse weight has an impossible shape")
    if form == "sparse":
        if any(part.ndim != 1 for part in parts):
            raise ValueError("a sparse weight has parts of the wrong shape")
        return SparseConstant((rows, columns), *parts)
    _, gaps, values, zero = parts
    fits = values.ndim == 2 and values.shape[1] in (1, 4) and columns % values.shape[1] == 0 and gaps.ndim == 1
    if not fits or zero.shape not in ((1,), (rows,)) or zero.dtype != values.dtype or rows * columns > _MOST_INTEGERS:
        raise ValueError("an integer weight has parts of the wrong type or shape")
    return SparseIntegers((rows, columns), *parts)


def _read_parts(
    entry: dict[str, Any], tensors: dict[str, np.ndarray], parts: dict[str, tuple[str, ...]]
) -> list[np.ndarray]:
    found = [tensors[entry[part]] for part in parts]
    for (part, dtypes), array in zip(parts.items(), found, strict=True):
        if array.dtype.name not in dtypes:
            raise ValueError(f"the {part} of a constant are of type {array.dtype}, expected {' or '.join(dtypes)}")
    return found


def _names(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("expected a list of names")
    return list(values)


def _type(kind: Any) -> TensorType:
    dtype, shape = kind
    if not isinstance(dtype, str) or not (
        shape is None or all(isinstance(extent, str) or (isinstance(extent, int) and extent >= 0) for extent in shape)
    ):
        raise ValueError("a type is described wrongly")
    return TensorType(dtype, None if shape is None else tuple(shape))
