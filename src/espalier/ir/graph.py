"""The typed graph every importer produces, every pass rewrites and every executor reads.

A graph holds two dialects side by side. Nodes of the domain ``espalier`` are the native dialect, defined
once in :mod:`espalier.ir.ops` with a NumPy body each. Nodes of any other domain are ONNX nodes kept as they
came (``Node.proto``), for ONNX Runtime to run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NATIVE = "espalier"

Dim = int | str
"""An extent: a number, or the name of a symbolic one (``"batch"``, ``"seq"``, ``"?3"`` when unknown)."""

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class TensorType:
    """Element type (a NumPy dtype name) and shape; ``shape`` is None when even the rank is unknown."""

    dtype: str
    shape: Shape | None

    def __str__(self) -> str:
        extents = "?" if self.shape is None else ", ".join(str(d) for d in self.shape)
        return f"{self.dtype}[{extents}]"


@dataclass
class Node:
    """One operation. ``inputs`` and ``outputs`` are value names; an absent optional input is ``""``.

    ``attrs`` of a native node are plain Python values, checked by its op spec. ``proto`` is the original
    ``onnx.NodeProto`` of a foreign node and None for a native one. ``why`` is for the report: why a foreign
    node is not native, or what a native one leaves out.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    domain: str = NATIVE
    name: str = ""
    proto: Any = None
    why: str = ""

    @property
    def is_native(self) -> bool:
        return self.domain == NATIVE


@dataclass
class Graph:
    """Nodes in topological order, with constants by name and the type of every value by name.

    ``constants`` may be read-only views of a memory-mapped file; nothing may write to them.
    ``opsets`` are the ONNX operator sets that foreign nodes were written against, by domain ("" is ONNX's own).
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    types: dict[str, TensorType]
    opsets: dict[str, int] = field(default_factory=dict)

    def producers(self) -> dict[str, Node]:
        """The node that makes each computed value."""
        return {out: node for node in self.nodes for out in node.outputs if out}

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value, in order."""
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    readers.setdefault(name, []).append(node)
        return readers

    def fresh(self, stem: str) -> str:
        """A value name that the graph does not use yet."""
        if stem not in self.types and stem not in self.constants:
            return stem
        number = 1
        while f"{stem}_{number}" in self.types or f"{stem}_{number}" in self.constants:
            number += 1
        return f"{stem}_{number}"

    def add_constant(self, stem: str, array: np.ndarray) -> str:
        """Add a constant under a fresh name and return that name."""
        name = self.fresh(stem)
        self.constants[name] = array
        self.types[name] = TensorType(array.dtype.name, tuple(array.shape))
        return name

    def prune(self) -> None:
        """Drop nodes whose outputs nobody reads, then constants and types that nobody names."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(out in needed for out in node.outputs):
                kept.append(node)
                needed.update(name for name in node_reads(node) if name)
        self.nodes = kept[::-1]
        named = needed | set(self.inputs) | {out for node in self.nodes for out in node.outputs}
        self.constants = {k: v for k, v in self.constants.items() if k in named}
        self.types = {k: v for k, v in self.types.items() if k in named}


def node_reads(node: Node) -> Iterable[str]:
    """Value names a node reads, those captured by its subgraphs (If, Loop, Scan) included."""
    yield from node.inputs
    if node.proto is not None:
        yield from _captured(node.proto)


def _captured(proto: Any) -> Iterable[str]:
    for attribute in proto.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in body.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (output.name for output in body.output)
