"""Drop what nothing needs."""

from __future__ import annotations

from espalier.ir.graph import Graph


def cleanup(graph: Graph) -> Graph:
    """Remove nodes, constants and types that no output depends on, in place; returns ``graph``."""
    graph.prune()
    return graph
