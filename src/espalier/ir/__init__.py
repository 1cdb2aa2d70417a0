"""The intermediate representation: a small typed graph and the native dialect."""

from espalier.ir.graph import NATIVE, Dim, Graph, Node, Shape, TensorType, node_reads
from espalier.ir.ops import ACTIVATIONS, OPS, AttrSpec, InputSpec, OpSpec
from espalier.ir.verify import verify

__all__ = [
    "ACTIVATIONS",
    "NATIVE",
    "OPS",
    "AttrSpec",
    "Dim",
    "Graph",
    "InputSpec",
    "Node",
    "OpSpec",
    "Shape",
    "TensorType",
    "node_reads",
    "verify",
]
