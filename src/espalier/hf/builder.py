"""Assemble a native graph from checked weights, layer by layer."""

from __future__ import annotations

from typing import Any

from espalier.hf.weights import Weights
from espalier.ir.graph import Graph, Node, TensorType
from espalier.ir.ops import OPS


class Builder:
    """A graph under construction. Methods take and give names of values; types are inferred as nodes are added."""

    def __init__(self, name: str) -> None:
        self.graph = Graph(name, [], [], [], {}, {})

    def input(self, name: str, dtype: str = "int64") -> str:
        """An input of shape ``[batch, seq]``."""
        self.graph.inputs.append(name)
        self.graph.types[name] = TensorType(dtype, ("batch", "seq"))
        return name

    def add(self, op: str, *inputs: str, name: str = "", **attrs: Any) -> str:
        """Append a node named ``name`` (a path of modules, for reports) and return its output."""
        kinds = [self.graph.types[value] if value else None for value in inputs]
        out = self.graph.fresh(f"{name or op}:out")
        self.graph.types[out] = OPS[op].infer(kinds, attrs)
        self.graph.nodes.append(Node(op, list(inputs), [out], attrs, name=name))
        return out

    def output(self, value: str, name: str) -> str:
        """Make a computed value an output of the graph, under a name of its own."""
        for node in self.graph.nodes:
            node.inputs = [name if read == value else read for read in node.inputs]
            node.outputs = [name if made == value else made for made in node.outputs]
        self.graph.types[name] = self.graph.types.pop(value)
        self.graph.outputs.append(name)
        return name


class Layers:
    """Parameterised layers: the weights of a folder put into a graph.

    Names are those of the architecture, complete with prefix. Constants keep the names they have in the file, after
    ``label``, so that a report can be read beside the checkpoint. A tensor that several layers use (tied embeddings)
    is one constant.
    """

    def __init__(self, builder: Builder, weights: Weights, label: str = "") -> None:
        self.b = builder
        self.weights = weights
        self.label = label
        self._constants: dict[tuple[str, tuple[int, ...]], str] = {}

    def weight(self, name: str, *shape: int) -> str:
        """The constant for a tensor of the file. Raises ModelFormatError unless it has this shape."""
        if (name, shape) not in self._constants:
            stored, array = self.weights.take(name, shape)
            self._constants[name, shape] = self.b.graph.add_constant(self.label + stored, array)
        return self._constants[name, shape]

    def embedding(self, ids: str, name: str, rows: int, features: int) -> str:
        return self.b.add("Embedding", self.weight(f"{name}.weight", rows, features), ids, name=name)

    def linear(self, x: str, name: str, columns: int, rows: int) -> str:
        """``x [..., columns] -> [..., rows]``, with a bias."""
        weight, bias = self.weight(f"{name}.weight", rows, columns), self.weight(f"{name}.bias", rows)
        return self.b.add("Linear", x, weight, bias, name=name)

    def norm(self, x: str, name: str, features: int, epsilon: float) -> str:
        gamma, beta = self.weight(f"{name}.weight", features), self.weight(f"{name}.bias", features)
        return self.b.add("LayerNorm", x, gamma, beta, name=name, epsilon=epsilon)

    def activation(self, x: str, kind: str) -> str:
        """``kind`` "" is the identity."""
        return self.b.add("Activation", x, kind=kind) if kind else x
