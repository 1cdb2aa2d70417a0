"""A small encoder of native nodes, and inputs for it: what the tests of every backend run."""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.ir import Graph, Node, TensorType
from espalier.ir.verify import verify

VOCABULARY = 90
LOWEST = float(np.finfo(np.float32).min)
Feeds = dict[str, np.ndarray]


class Tiny:
    """A graph over ``ids`` and ``mask``, node by node, 32 features wide.

    ``sparsity``: the share of zeros in weights of linear layers, in columns of ``pattern`` rows.
    """

    def __init__(self, seed: int = 0, *, sparsity: float = 0.0, pattern: int = 1) -> None:
        self.random = np.random.default_rng(seed)
        self.sparsity, self.pattern = sparsity, pattern
        tokens = TensorType("int64", ("batch", "seq"))
        self.graph = Graph("tiny", ["ids", "mask"], [], [], {}, {"ids": tokens, "mask": tokens})

    def constant(self, *shape: int, dtype: Any = np.float32) -> str:
        return self.graph.add_constant("c", (self.random.standard_normal(shape) * 0.3).astype(dtype))

    def integers(self, *shape: int, dtype: Any = np.int8) -> str:
        limits = np.iinfo(dtype)
        return self.graph.add_constant("q", self.random.integers(limits.min, limits.max + 1, shape).astype(dtype))

    def node(
        self, op: str, inputs: list[str], shape: tuple[int | str, ...], dtype: str = "float32", **attrs: Any
    ) -> str:
        name = self.graph.fresh(op.lower())
        self.graph.nodes.append(Node(op, inputs, [name], attrs, name=name))
        self.graph.types[name] = TensorType(dtype, shape)
        return name

    def weight(self, rows: int, columns: int) -> str:
        values = (self.random.standard_normal((rows, columns)) * 0.3).astype(np.float32)
        if rows % self.pattern == 0:
            kept = self.random.random((rows // self.pattern, columns)) >= self.sparsity
            values *= np.repeat(kept, self.pattern, 0)
        return self.graph.add_constant("w", values)

    def linear(self, x: str, columns: int, rows: int, *, bias: bool = True) -> str:
        inputs = [x, self.weight(rows, columns), self.constant(rows) if bias else ""]
        return self.node("Linear", inputs, (*self.shape(x)[:-1], rows))

    def norm(self, x: str, *, beta: bool = True) -> str:
        inputs = [x, self.constant(32), self.constant(32) if beta else ""]
        return self.node("LayerNorm", inputs, self.shape(x), epsilon=1e-5)

    def shape(self, x: str) -> tuple[int | str, ...]:
        shape = self.graph.types[x].shape
        assert shape is not None
        return shape

    def embedded(self) -> str:
        wide = ("batch", "seq", 32)
        places = self.node("Positions", ["ids"], (1, "seq"), "int64", offset=2)
        words = self.node("Embedding", [self.constant(VOCABULARY, 32), "ids"], wide)
        more = self.node("Embedding", [self.constant(90, 32), places], (1, "seq", 32))
        return self.norm(self.node("Add", [words, more], wide))

    def done(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        verify(self.graph)
        return self.graph


def encoder(
    *,
    mask_value: float = LOWEST,
    bias: bool = False,
    merged: bool = True,
    sparsity: float = 0.0,
    pattern: int = 1,
    seed: int = 0,
) -> Graph:
    """One layer of four heads, and every kind of output: tokens, sequences, and a slice of one feature.

    ``bias``: with relative positions; ``merged``: queries, keys and values are of one input.
    """
    t = Tiny(seed, sparsity=sparsity, pattern=pattern)
    wide = ("batch", "seq", 32)
    x = t.embedded()
    extra = ""
    if bias:
        extra = t.node("RelativeBias", [t.constant(8, 4), "ids"], (1, 4, "seq", "seq"), num_buckets=8, max_distance=16)
    q, k, v = t.linear(x, 32, 32, bias=False), t.linear(x, 32, 32), t.linear(x if merged else q_of(t, x), 32, 32)
    mixed = t.node("Attention", [q, k, v, "mask", extra], wide, heads=4, scale=0.35, mask_value=mask_value)
    x = t.norm(t.node("Add", [t.linear(mixed, 32, 32), x], wide), beta=False)
    up = t.node("Activation", [t.linear(x, 32, 48)], ("batch", "seq", 48), kind="gelu")
    x = t.node("Add", [x, t.linear(up, 48, 32)], wide)
    first = t.node("SelectToken", [x], ("batch", 32), index=0)
    last = t.node("SelectToken", [x], ("batch", 32), index=-1)
    pooled = t.node("Activation", [t.linear(first, 32, 32)], ("batch", 32), kind="tanh")
    unit = t.node(
        "L2Normalize", [t.node("MaskedMean", [x, "mask"], ("batch", 32), epsilon=1e-9)], ("batch", 32), epsilon=1e-12
    )
    end = t.node("SliceFeatures", [t.linear(x, 32, 2)], ("batch", "seq"), start=1, stop=2, squeeze=True)
    return t.done(x, pooled, unit, end, last)


def q_of(t: Tiny, x: str) -> str:
    """Another value of the same shape, so that the values' layer cannot join those of queries and keys."""
    return t.node("Mul", [x, t.constant(32)], t.shape(x))


def feeds(batch: int, seq: int, kind: str, seed: int = 0) -> Feeds:
    """Random ids, and a mask: ``full``, padding at the ``right`` or ``left``, or ``holes``."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, seq + 1, batch)
    mask = (np.arange(seq) < lengths[:, None]).astype(np.int64)
    if kind == "full":
        mask[:] = 1
    elif kind == "left":
        mask = mask[:, ::-1].copy()
    elif kind == "holes":
        mask = (random.random((batch, seq)) < 0.5).astype(np.int64)
    return {"ids": random.integers(0, VOCABULARY, (batch, seq)), "mask": mask}
