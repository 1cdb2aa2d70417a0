"""Constant folding: nodes whose inputs are all constants become constants.

Nothing that would copy a weight is evaluated, except a conversion of its element type: half-precision weights are
converted once here, and weights that the model quantises itself are quantised. Integers are never made floats.
Transposes and reshapes of weights are NumPy views.
"""

from __future__ import annotations

from espalier.ir.graph import Graph, Node, TensorType
from espalier.passes.evaluate import EvaluationError, attributes, evaluate

SMALL = 1 << 16
"""Elements. Larger arrays take part only in views and in conversions of the element type."""

VIEWS = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size"})
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def fold(graph: Graph) -> Graph:
    """Evaluate every node that depends on constants alone, in place; returns ``graph``."""
    kept: list[Node] = []
    outputs = set(graph.outputs)
    opset = graph.opsets.get("", 1)
    for node in graph.nodes:
        if not _foldable(graph, node) or not _evaluate(graph, node, opset, outputs):
            kept.append(node)
    graph.nodes = kept
    graph.prune()
    return graph


def _foldable(graph: Graph, node: Node) -> bool:
    if node.is_native or node.domain != "" or node.op in RANDOM:
        return False
    if any(name and name not in graph.constants for name in node.inputs):
        return False
    if node.op not in ("Constant", "ConstantOfShape") and not any(node.inputs):
        return False
    if node.op == "DequantizeLinear":
        return False  # a quantised weight stays one
    big = any(name and graph.constants[name].size > SMALL for name in node.inputs)
    return not big or node.op in VIEWS or _converts(graph, node)


def _converts(graph: Graph, node: Node) -> bool:
    if node.op == "QuantizeLinear":
        return True
    return node.op == "Cast" and graph.constants[node.inputs[0]].dtype.name in ("float16", "bfloat16", "float64")


def _evaluate(graph: Graph, node: Node, opset: int, outputs: set[str]) -> bool:
    if any(out in outputs for out in node.outputs):
        return False  # a graph output needs a node that makes it
    try:
        results = evaluate(node, attributes(node), [graph.constants[n] if n else None for n in node.inputs], opset)
    except EvaluationError:
        return False
    if len(results) < len(node.outputs):
        return False
    if node.op not in VIEWS and not _converts(graph, node) and any(r.size > 16 * SMALL for r in results):
        return False
    for name, array in zip(node.outputs, results, strict=False):
        if not name:
            continue
        graph.constants[name] = array
        graph.types[name] = TensorType(array.dtype.name, tuple(array.shape))
    return True
