"""From a native graph to something that runs: lowering, choice of formats, packing, and the plan file."""

from __future__ import annotations

from espalier.compiler.native import NativeProgram
from espalier.compiler.plan import read_plan, save_plan
from espalier.ir.graph import Graph

__all__ = ["NativeProgram", "build", "read_plan", "save_plan"]


def build(graph: Graph, *, threads: int, tune: bool = True, exact_padding: bool = False) -> NativeProgram:
    """Compile a graph of native nodes for this machine.

    Raises UnsupportedModelError when the engine cannot run it, GraphError when it is malformed.
    """
    return NativeProgram(graph, threads=threads, tune=tune, exact_padding=exact_padding)
