"""Assemble a native graph from checked weights, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from espalier.errors import ModelFormatError
from espalier.hf.quantization import Quantization
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

    def __init__(
        self, builder: Builder, weights: Weights, quantization: Quantization | None = None, *, label: str = ""
    ) -> None:
        self.b = builder
        self.weights = weights
        self.quantization = quantization or Quantization()
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
        activations = self.quantization.activations(name)
        if activations is None:
            weight, bias = self.weight(f"{name}.weight", rows, columns), self.weight(f"{name}.bias", rows)
            return self.b.add("Linear", x, weight, bias, name=name)
        weight = self.integers(f"{name}.weight", rows, columns)
        parameters = [self._scale(f"{name}.weight", rows), self._zero_point(f"{name}.weight", rows)]
        parameters.append(self.weight(f"{name}.bias", rows))
        if activations == "static":
            none = np.zeros((), np.int8)  # a symmetric input may come without a zero point
            zero = self._zero_point(f"{name}.input", 1) or self.b.graph.add_constant(f"{name}.zero", none)
            parameters += [self._scale(f"{name}.input", 1), zero]
        return self.b.add("QLinear", x, weight, *parameters, name=name, activations=activations)

    def integers(self, name: str, *shape: int) -> str:
        """The constant for a tensor of bytes of the file."""
        stored, array = self.weights.take_integers(name, shape)
        return self.b.graph.add_constant(self.label + stored, array)

    def _scale(self, name: str, rows: int) -> str:
        shape = self._shape(f"{name}_scale", rows)
        stored, array = self.weights.take(f"{name}_scale", shape)
        if not bool((np.isfinite(array) & (array > 0)).all()):
            raise ModelFormatError(f"{self.weights.source}: tensor {stored!r} must hold finite numbers above 0")
        return self.b.graph.add_constant(self.label + stored, _flat(array))

    def _zero_point(self, name: str, rows: int) -> str:
        """The constant, "" where the file has none: a symmetric one."""
        if f"{name}_zero_point" not in self.weights:
            return ""
        stored, array = self.weights.take_integers(f"{name}_zero_point", self._shape(f"{name}_zero_point", rows))
        return self.b.graph.add_constant(self.label + stored, _flat(array))

    def _shape(self, name: str, rows: int) -> tuple[int, ...]:
        """The shape that a parameter of quantisation has in the file, if it can be one for all or one per row."""
        shape = self.weights.shape(name)
        return shape if math.prod(shape) == 1 or shape == (rows,) else (rows, 1)

    def norm(self, x: str, name: str, features: int, epsilon: float) -> str:
        gamma, beta = self.weight(f"{name}.weight", features), self.weight(f"{name}.bias", features)
        return self.b.add("LayerNorm", x, gamma, beta, name=name, epsilon=epsilon)

    def activation(self, x: str, kind: str) -> str:
        """``kind`` "" is the identity."""
        return self.b.add("Activation", x, kind=kind) if kind else x


def _flat(array: np.ndarray) -> np.ndarray:
    """``[]`` for a single number, else ``[rows]``."""
    return array.reshape(() if array.size == 1 else -1)
