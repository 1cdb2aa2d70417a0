"""Cut a lifted graph into steps: native segments for the engine, the rest for ONNX Runtime.

Steps are convex by construction. Every node gets a *phase*: even phases are ONNX Runtime's, odd ones the engine's, and
no edge goes from a later phase to an earlier one. Steps run in order of phase, so one phase is one step and its
nodes are a maximal set that can run together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from espalier.errors import GraphError
from espalier.ir.graph import Graph, Node, TensorType, node_reads
from espalier.passes.worth import not_worth_it

MAX_ISLANDS = 4
"""With more native segments than this, the copies between them cost more than the engine wins."""

_PROTOBUF_LIMIT = 2**31 - 2**24

_ONE_PER_SEQUENCE = frozenset({"SelectToken", "MaskedMean"})
_ARRANGEMENTS = frozenset({"ImageToTokens", "TokensToImage", "Unfold"})
"""What only the engine needs: no work that a report of ONNX Runtime's should list."""


@dataclass(frozen=True)
class Placed:
    """One node left to ONNX Runtime, and why the engine does not run it (for the report)."""

    op: str
    name: str
    why: str


@dataclass
class NativeSegment:
    """A graph of native nodes only.

    ``exact_padding``: a value of shape ``[B, S, ...]`` leaves for a step that may read its padding, so the engine
    computes padding tokens as ONNX Runtime does instead of leaving them out.
    """

    graph: Graph
    exact_padding: bool = False


@dataclass
class OrtSegment:
    """A model for ONNX Runtime: a file or serialised ONNX bytes. ``whole`` says it is the model as it was given."""

    model: Path | bytes
    inputs: list[str]
    outputs: list[str]
    nodes: list[Placed] = field(default_factory=list)
    whole: bool = False


Step = NativeSegment | OrtSegment


@dataclass
class Program:
    """Ordered steps from ``inputs`` to ``outputs``: what a session runs and a plan stores.

    ``types`` has an entry for every input and output; ``constants`` the outputs that are the same in every run.
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    types: dict[str, TensorType]
    steps: list[Step]
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, steps: list[Step]) -> Program:
        """The program of a graph that was cut into ``steps``."""
        ends = dict.fromkeys([*graph.inputs, *graph.outputs])
        types = {name: graph.types[name] for name in ends if name in graph.types}
        constants = {name: graph.constants[name] for name in graph.outputs if name in graph.constants}
        return cls(graph.name, list(graph.inputs), list(graph.outputs), types, steps, constants)


def partition(graph: Graph, original: Path | bytes | None = None, *, images: bool = True) -> list[Step]:
    """The steps that compute ``graph.outputs``, in order of execution.

    ``original`` is the ONNX model the graph was read from, None when it came from elsewhere. Where running
    natively would not pay, the result is one step over ``original``, which ONNX Runtime then reads itself. ``images``:
    whether native parts may hold convolutions.

    Raises GraphError when a native node reads a value that nothing makes.
    """
    if original is not None:
        refusal = not_worth_it(graph, images=images)
        if refusal:
            return [whole(graph, original, refusal)]
    phases = _phases(graph)
    groups = [[node for node in graph.nodes if phases[id(node)] == phase] for phase in sorted(set(phases.values()))]
    if original is not None:
        islands = sum(group[0].is_native for group in groups)
        if islands > MAX_ISLANDS:
            return [whole(graph, original, f"{islands} separate native parts; the copies between them do not pay")]
        unknown = _untyped_edges(graph, groups)
        if unknown:
            return [whole(graph, original, f"the type of {unknown[0]!r}, which leaves a native part, is unknown")]
        copied = sum(_constant_bytes(graph, group) for group in groups if not group[0].is_native)
        if copied > _PROTOBUF_LIMIT:
            return [whole(graph, original, "the constants of the other parts exceed what an ONNX message can hold")]
    return [_segment(graph, groups, index) for index in range(len(groups))]


def whole(graph: Graph, original: Path | bytes, why: str) -> OrtSegment:
    """One step over the original model. ``why`` explains the nodes that the engine could have run."""
    nodes = [
        Placed(node.op, node.name, why if node.is_native else node.why)
        for node in graph.nodes
        if node.op not in _ARRANGEMENTS or not node.is_native
    ]
    return OrtSegment(original, list(graph.inputs), list(graph.outputs), nodes, whole=True)


def _reads(node: Node, makers: dict[str, Node]) -> list[Node]:
    """The nodes whose outputs ``node`` reads."""
    return [makers[name] for name in dict.fromkeys(node_reads(node)) if name in makers]


def _phases(graph: Graph) -> dict[int, int]:
    """Phase by ``id(node)``: as early as possible, then pulled towards the readers.

    The pull is what merges a light native node (an embedding, a residual of a head) into the segment that reads
    it, instead of leaving it as an island of its own.
    """
    makers = graph.producers()
    phases: dict[int, int] = {}
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        parity = int(node.is_native)
        earliest = parity
        for maker in _reads(node, makers):
            if id(maker) not in phases:
                raise GraphError(f"{node.op} {node.name!r} reads a value made after it; expected topological order")
            readers.setdefault(id(maker), []).append(node)
            earliest = max(earliest, phases[id(maker)])
        phases[id(node)] = earliest + (earliest - parity) % 2
    for node in reversed(graph.nodes):
        after = readers.get(id(node))
        if after:
            latest = min(phases[id(reader)] for reader in after)
            phases[id(node)] = latest - (latest - int(node.is_native)) % 2
    return phases


def _untyped_edges(graph: Graph, groups: list[list[Node]]) -> list[str]:
    """Values that cross between steps and are not tensors of a known element type."""
    bad: list[str] = []
    for index in range(len(groups)):
        inputs, outputs = _edges(graph, groups, index)
        if len(groups) > 1:
            bad += [name for name in (*inputs, *outputs) if not _is_tensor(graph.types.get(name))]
    return bad


def _constant_bytes(graph: Graph, group: list[Node]) -> int:
    read = {name for node in group for name in node_reads(node)}
    return sum(graph.constants[name].nbytes for name in read if name in graph.constants)


def _is_tensor(kind: TensorType | None) -> bool:
    if kind is None:
        return False
    try:
        _element(kind.dtype)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _edges(graph: Graph, groups: list[list[Node]], index: int) -> tuple[list[str], list[str]]:
    """Names that a group takes from outside (constants apart), and those it makes that something outside reads."""
    group = groups[index]
    made = {name for node in group for name in node.outputs if name}
    known = set(graph.inputs) | {name for node in graph.nodes for name in node.outputs}
    read = dict.fromkeys(name for node in group for name in node_reads(node))
    inputs = [name for name in read if name in known and name not in made]
    outside = {name for other in groups if other is not group for node in other for name in node_reads(node)}
    outside |= set(graph.outputs)
    outputs = [name for node in group for name in node.outputs if name and name in outside]
    return inputs, outputs


def _segment(graph: Graph, groups: list[list[Node]], index: int) -> Step:
    group = groups[index]
    inputs, outputs = _edges(graph, groups, index)
    read = {name for node in group for name in node_reads(node)}
    constants = {name: array for name, array in graph.constants.items() if name in read}
    named = read | {name for node in group for name in node.outputs}
    types = {name: kind for name, kind in graph.types.items() if name in named}
    part = Graph(f"{graph.name}.{index}", inputs, outputs, group, constants, types, dict(graph.opsets))
    if not group[0].is_native:
        placed = [Placed(node.op, node.name, node.why) for node in group]
        return OrtSegment(serialize(part), inputs, outputs, placed)
    later = {name for other in groups[index + 1 :] for node in other for name in node_reads(node)}
    tokens = token_values(part)
    return NativeSegment(part, exact_padding=any(name in later and name in tokens for name in outputs))


def token_values(graph: Graph) -> set[str]:
    """Computed values of a native graph that have one row per token, padding included (shape ``[B, S, ...]``)."""
    tokens = {name for name in graph.inputs if _looks_like_tokens(graph.types.get(name))}
    computed: set[str] = set()
    for node in graph.nodes:
        if node.op in _ONE_PER_SEQUENCE:
            continue
        # What only constants feed is a table of positions at most: the same for every token of the batch.
        if node.op in ("Positions", "PositionsFromIds", "Embedding") or any(name in tokens for name in node.inputs):
            tokens.update(node.outputs)
            computed.update(node.outputs)
    return computed


def _looks_like_tokens(kind: TensorType | None) -> bool:
    if kind is None or kind.shape is None:
        return True
    return len(kind.shape) >= 3 or (len(kind.shape) == 2 and not kind.dtype.startswith("float"))


def serialize(graph: Graph) -> bytes:
    """Foreign nodes as a stand-alone ONNX model.

    Raises GraphError when the graph holds a native node or an untyped input.
    """
    from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

    native = [node.op for node in graph.nodes if node.proto is None]
    if native:
        raise GraphError(f"cannot write {native[0]} as ONNX: it is native; only foreign nodes go to ONNX Runtime")

    def info(name: str, required: bool) -> ValueInfoProto:
        kind = graph.types.get(name)
        if kind is None or not _is_tensor(kind):
            if required:
                raise GraphError(f"cannot write {name!r} as an ONNX input: its element type is unknown")
            return helper.make_empty_tensor_value_info(name)
        # Shapes that ONNX Runtime can work out stay open: an extent that inference got wrong would be an error.
        shape = None if kind.shape is None or not required else [_extent(dim) for dim in kind.shape]
        return helper.make_tensor_value_info(name, _element(kind.dtype), shape)

    tensors: list[TensorProto] = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    body = helper.make_graph(
        [node.proto for node in graph.nodes],
        graph.name or "segment",
        [info(name, True) for name in graph.inputs],
        [info(name, False) for name in graph.outputs],
        tensors,
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    model = helper.make_model(body, opset_imports=opsets)
    # IR version 10 is the first that knows every element type an opset can name, and is widely readable.
    model.ir_version = max(10, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    data: bytes = model.SerializeToString()
    return data


def _extent(dim: int | str) -> int | str | None:
    return None if isinstance(dim, str) and dim.startswith("?") else dim


def _element(dtype: str) -> int:
    """The ONNX element type of a NumPy dtype name. Raises KeyError or TypeError when there is none."""
    from onnx import TensorProto, helper

    if dtype in ("str", "object", "string"):
        return int(TensorProto.STRING)
    if dtype in ("bfloat16",) or dtype.startswith(("float8", "int4", "uint4", "float4", "int2", "uint2")):
        import ml_dtypes

        if not hasattr(ml_dtypes, dtype):
            raise KeyError(dtype)
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(getattr(ml_dtypes, dtype))))
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
