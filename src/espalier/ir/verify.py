"""What every graph must satisfy after every pass."""

from __future__ import annotations

from espalier.errors import GraphError
from espalier.ir.graph import Graph, Node, TensorType, node_reads
from espalier.ir.inference import compatible
from espalier.ir.ops import OPS


def verify(graph: Graph) -> None:
    """Check a graph against the rules of the IR and the specs of the native dialect.

    Checked: every value has one producer (an input, a constant or one node output) and is defined before it is
    read; inputs and native values are typed; constants match their types; native ops are known, with the operands
    and attributes of their specs; declared types agree with the inferred ones. Two symbolic extents agree whatever
    their names: which are equal is known only when running.

    Raises GraphError naming the node or value.
    """
    defined: set[str] = set()
    for name in graph.inputs:
        _define(defined, name, "graph input")
        if name not in graph.types:
            raise GraphError(f"graph input {name!r} has no type; expected an entry in Graph.types")
    for name in graph.constants:
        _define(defined, name, "constant")
        _check_constant(graph, name)
    made = {out for node in graph.nodes for out in node.outputs if out}
    for index, node in enumerate(graph.nodes):
        where = _where(index, node)
        for name in node.inputs:
            if name and name not in defined:
                reason = "made later; nodes must be in topological order" if name in made else "never made"
                raise GraphError(f"{where} reads {name!r}, which is {reason}")
        if not node.is_native:
            _check_foreign(node, where, made, defined)
        for out in node.outputs:
            if out:
                _define(defined, out, f"output of {where}")
        if node.is_native:
            _check_native(graph, node, where)
    for name in graph.outputs:
        if name not in defined:
            raise GraphError(f"graph output {name!r} is never made; expected an input, a constant or a node output")
    if len(set(graph.outputs)) != len(graph.outputs):
        raise GraphError(f"graph outputs must have distinct names, got {', '.join(graph.outputs)}")


def _where(index: int, node: Node) -> str:
    return f"node {index} ({node.op}{' ' + repr(node.name) if node.name else ''})"


def _define(defined: set[str], name: str, what: str) -> None:
    if not name:
        raise GraphError(f"{what} has an empty name")
    if name in defined:
        raise GraphError(f"value {name!r} has two producers; the second is a {what}")
    defined.add(name)


def _check_constant(graph: Graph, name: str) -> None:
    array = graph.constants[name]
    kind = graph.types.get(name)
    if kind is None:
        raise GraphError(f"constant {name!r} has no type; expected {array.dtype.name}{list(array.shape)}")
    # NumPy has many names for strings; ONNX has one.
    text = array.dtype.kind in "OSU"
    if not compatible(kind.shape, array.shape) or not (text or kind.dtype == array.dtype.name):
        raise GraphError(f"constant {name!r} is declared {kind}, but is {array.dtype.name}{list(array.shape)}")


def _check_native(graph: Graph, node: Node, where: str) -> None:
    spec = OPS.get(node.op)
    if spec is None:
        raise GraphError(f"{where} is no op of the native dialect; expected one of {', '.join(OPS)}")
    if len(node.outputs) != 1 or not node.outputs[0]:
        raise GraphError(f"{where} must have one output, got {node.outputs}")
    types: list[TensorType | None] = []
    for position, name in enumerate(node.inputs):
        kind = graph.types.get(name) if name else None
        if name and kind is None:
            raise GraphError(f"{where} reads {name!r}, whose type is unknown; native ops need typed operands")
        types.append(kind)
        operand = spec.inputs[position] if position < len(spec.inputs) else None
        if name and operand is not None and operand.constant and name not in graph.constants:
            raise GraphError(f"{where}: operand {operand.name!r} must be a constant, got the computed value {name!r}")
    try:
        inferred = spec.infer(types, node.attrs)
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from error
    out = node.outputs[0]
    declared = graph.types.get(out)
    if declared is None:
        raise GraphError(f"{where}: output {out!r} has no type; expected {inferred}")
    if declared.dtype != inferred.dtype or not compatible(declared.shape, inferred.shape):
        raise GraphError(f"{where}: output {out!r} is declared {declared}, but its operands make it {inferred}")


def _check_foreign(node: Node, where: str, made: set[str], defined: set[str]) -> None:
    if node.proto is None:
        raise GraphError(f"{where} of domain {node.domain!r} has no ONNX node to run; expected Node.proto")
    # Names that subgraphs define for themselves cannot clash with the graph's: ONNX forbids shadowing.
    for name in node_reads(node):
        if name in made and name not in defined:
            raise GraphError(f"{where} captures {name!r}, which is made later; nodes must be in topological order")
