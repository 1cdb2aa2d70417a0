"""A tiny BERT as a native graph, as ONNX bytes, and behind a foreign mask: what the session tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from espalier.ir import Graph, Node, TensorType

VOCABULARY, POSITIONS, FEATURES, HEADS = 50, 16, 16, 2
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Builder:
    """Adds native nodes and seeded constants to a graph, one value at a time."""

    def __init__(self, inputs: tuple[str, ...] = INPUTS) -> None:
        types = {name: TensorType("int64", ("batch", "seq")) for name in inputs}
        self.graph = Graph("tiny", list(inputs), [], [], {}, types)
        self.rng = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        array = self.rng.normal(0, 0.5, shape).astype(np.float32)
        return self.graph.add_constant(f"w{len(self.graph.constants)}", array)

    def add(self, op: str, *inputs: str, shape: tuple[int | str, ...], dtype: str = "float32", **attrs: Any) -> str:
        name = f"{op}_{len(self.graph.nodes)}"
        self.graph.nodes.append(Node(op, list(inputs), [name], attrs, name=name))
        self.graph.types[name] = TensorType(dtype, shape)
        return name

    def encoder(self, mask: str) -> str:
        """One layer over the three inputs; returns the hidden state."""
        tokens = ("batch", "seq", FEATURES)
        word = self.add("Embedding", self.weight(VOCABULARY, FEATURES), "input_ids", shape=tokens)
        columns = self.add("Positions", "input_ids", shape=(1, "seq"), dtype="int64", offset=0)
        place = self.add("Embedding", self.weight(POSITIONS, FEATURES), columns, shape=(1, "seq", FEATURES))
        x = self.add("Add", word, place, shape=tokens)
        if "token_type_ids" in self.graph.inputs:
            x = self.add(
                "Add", x, self.add("Embedding", self.weight(2, FEATURES), "token_type_ids", shape=tokens), shape=tokens
            )
        x = self.norm(x)
        q, k, v = (self.linear(x, FEATURES) for _ in range(3))
        attended = self.add(
            "Attention",
            q,
            k,
            v,
            mask,
            "",
            shape=tokens,
            heads=HEADS,
            scale=0.3,
            mask_value=float(np.finfo(np.float32).min),
        )
        x = self.norm(self.add("Add", x, self.linear(attended, FEATURES), shape=tokens))
        wide = self.add("Activation", self.linear(x, 32), shape=("batch", "seq", 32), kind="gelu")
        return self.norm(self.add("Add", x, self.linear(wide, FEATURES), shape=tokens))

    def linear(self, x: str, rows: int) -> str:
        kind = self.graph.types[x]
        assert kind.shape is not None
        shape = (*kind.shape[:-1], rows)
        return self.add("Linear", x, self.weight(rows, int(kind.shape[-1])), self.weight(rows), shape=shape)

    def norm(self, x: str) -> str:
        shape = self.graph.types[x].shape
        assert shape is not None
        return self.add("LayerNorm", x, self.weight(FEATURES), self.weight(FEATURES), shape=shape, epsilon=1e-5)


@pytest.fixture
def tiny() -> Graph:
    """Outputs: the hidden state ``[batch, seq, 16]`` and class scores ``[batch, 3]``."""
    builder = Builder()
    hidden = builder.encoder("attention_mask")
    first = builder.add("SelectToken", hidden, shape=("batch", FEATURES), index=0)
    builder.graph.outputs = [hidden, builder.linear(first, 3)]
    return builder.graph


@pytest.fixture
def mixed() -> Graph:
    """The mask is a foreign ``Cast(Greater(input_ids, 0))``; a foreign ReduceSum reads the hidden state."""
    from onnx import helper

    builder = Builder(("input_ids",))
    graph = builder.graph
    graph.opsets = {"": 17}
    zero = graph.add_constant("zero", np.array(0, np.int64))
    axis = graph.add_constant("axis", np.array([1], np.int64))

    def foreign(op: str, inputs: list[str], out: str, kind: TensorType, **attrs: Any) -> str:
        proto = helper.make_node(op, inputs, [out], name=out, **attrs)
        graph.nodes.append(Node(op, inputs, [out], domain="", name=out, proto=proto, why=f"{op} is not of the dialect"))
        graph.types[out] = kind
        return out

    above = foreign("Greater", ["input_ids", zero], "above", TensorType("bool", ("batch", "seq")))
    mask = foreign("Cast", [above], "mask", TensorType("int64", ("batch", "seq")), to=7)
    hidden = builder.encoder(mask)
    kind = TensorType("float32", ("batch", FEATURES))
    graph.outputs = [hidden, foreign("ReduceSum", [hidden, axis], "sums", kind, keepdims=0)]
    return graph


@pytest.fixture
def onnx_bytes() -> Callable[[Graph], bytes]:
    """Writes any graph as plain ONNX: the model that a session would have been given."""
    pytest.importorskip("onnx")
    from espalier.onnx import writer

    return lambda graph: writer.to_model(graph).SerializeToString()


def feeds_for(names: tuple[str, ...] | list[str], lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Right-padded feeds of these lengths."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    every = {
        "input_ids": rng.integers(1, VOCABULARY, mask.shape) * mask,
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, mask.shape) * mask,
    }
    return {name: every[name] for name in names}


@pytest.fixture
def make_feeds() -> Callable[..., dict[str, np.ndarray]]:
    """``make_feeds(names, lengths, seed=0)``: right-padded feeds."""
    return feeds_for
