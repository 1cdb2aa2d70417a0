"""Lifting: ONNX nodes that the engine can run become nodes of the native dialect."""

from __future__ import annotations

from espalier.ir.graph import Graph, TensorType


def lift(graph: Graph) -> Graph:
    """The graph with everything that is proven to be an encoder's part lifted; the rest stays foreign, with ``why``."""
    # The rule modules register themselves.
    from espalier.passes.lifting import (  # noqa: F401
        extents,
        rules_fused,
        rules_images,
        rules_layout,
        rules_math,
        rules_quantized,
    )
    from espalier.passes.lifting.lifter import Lifter, SameExtentError

    while True:
        try:
            return Lifter(graph).run()
        except SameExtentError as same:
            # One symbol fewer each time, so this ends.
            graph = _renamed(graph, same.old, same.new)


def _renamed(graph: Graph, old: str, new: str) -> Graph:
    types = {
        name: kind if kind.shape is None else TensorType(kind.dtype, tuple(new if d == old else d for d in kind.shape))
        for name, kind in graph.types.items()
    }
    return Graph(graph.name, graph.inputs, graph.outputs, graph.nodes, graph.constants, types, graph.opsets)
