"""What a packed program needs from the outside at every run, worked out once from the graph.

A program computes on packed tokens only. What the graph says about batches (masks, positions, biases, which slice of
which value is an output) is separated here, for every backend alike; :mod:`espalier.compiler.packed` follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from espalier.errors import UnsupportedModelError
from espalier.ir.graph import Graph, Node
from espalier.ir.images import Pair

HARD_MASK = -1000.0
"""A mask value at or below this makes a key's probability exactly zero, so that masked tokens may be left out."""

HostFunction = Callable[[dict[str, np.ndarray], int, int], np.ndarray]
"""Computes a small tensor from the padded inputs, the batch size and the padded length."""


@dataclass(frozen=True)
class Output:
    """Where an output comes from: ``number`` of the program's store, and how rows become the graph's tensor.

    ``domain``: "token", "sequence" or "image", which has ``pixels`` per sequence; with a ``grid`` of rows and columns
    it is stored as planes.
    """

    name: str
    number: int
    domain: str
    width: int
    squeeze: bool
    dtype: str
    pixels: int = 0
    grid: Pair | None = None

    def extents(self, tokens: int, sequences: int) -> tuple[int, int]:
        """Rows and columns of what the backend fills for a batch."""
        if self.grid is not None:
            return sequences * self.width, self.pixels
        rows = {"token": tokens, "sequence": sequences, "image": sequences * self.pixels}
        return rows[self.domain], self.width


@dataclass(frozen=True)
class Store:
    """An output as features ``[first, first + width)`` of a computed value, to the last one where width is None; with a
    ``grid``, as an image of so many rows and columns.
    """

    output: str
    first: int
    width: int | None
    squeeze: bool
    dtype: str
    grid: Pair | None = None


@dataclass
class Plumbing:
    """What each run has to feed the program.

    ``indices``: per index input what computes its ``[B, S]`` or ``[1, S]`` integers. ``floats``: per float input its
    graph name and domain ("image" for ``[B, F, rows, columns]``). ``biases``: per bias input what computes it in the
    backend's layout.
    """

    indices: list[HostFunction] = field(default_factory=list)
    floats: list[tuple[str, str]] = field(default_factory=list)
    biases: list[HostFunction] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    key_mask: str = ""
    mask_value: float = 0.0
    mean_mask: str = ""
    columns: list[int] = field(default_factory=list)
    """Columns that SelectToken reads: a row that leaves one of them out cannot be unpadded."""
    may_unpad: bool = False


def masks_of(graph: Graph, *, exact_padding: bool) -> Plumbing:
    """Plumbing with its masks filled in. A program knows one mask per batch: every attention must use the same, and so
    must means to be unpadded. Raises UnsupportedModelError.
    """
    plumbing = Plumbing()
    attentions = [node for node in graph.nodes if node.op == "Attention"]
    masks = {
        (node.inputs[3], node.attrs["mask_value"]) if len(node.inputs) > 3 and node.inputs[3] else ("", 0.0)
        for node in attentions
    }
    if len(masks) > 1:
        raise UnsupportedModelError("the attention layers use different masks; the engine takes one per batch")
    if masks:
        plumbing.key_mask, plumbing.mask_value = masks.pop()
    means = {node.inputs[1] for node in graph.nodes if node.op == "MaskedMean" and len(node.inputs) > 1}
    if len(means) > 1:
        raise UnsupportedModelError("the means use different masks; the engine takes one per batch")
    if means:
        plumbing.mean_mask = means.pop()
    plumbing.may_unpad = (
        bool(plumbing.key_mask)
        and not exact_padding
        and plumbing.mask_value <= HARD_MASK
        and plumbing.mean_mask in ("", plumbing.key_mask)
    )
    return plumbing


def stores_of(graph: Graph, producers: Mapping[str, Node]) -> dict[str, list[Store]]:
    """The graph's outputs by the value they are stored from, past the casts and slices at the edge of the graph."""
    stores: dict[str, list[Store]] = {}
    for output in graph.outputs:
        name, first, width, squeeze, grid = output, 0, None, False, None
        while name in producers and producers[name].op in ("Cast", "SliceFeatures", "TokensToImage"):
            node = producers[name]
            if node.op == "TokensToImage":
                grid = (node.attrs["rows"], node.attrs["columns"])
            if node.op == "SliceFeatures":
                if squeeze:
                    break
                if width is None:
                    width = node.attrs["stop"] - node.attrs["start"]
                    squeeze = node.attrs["squeeze"]
                first += node.attrs["start"]
            name = node.inputs[0]
        stores.setdefault(name, []).append(Store(output, first, width, squeeze, graph.types[output].dtype, grid))
    return stores


def host_function(graph: Graph, producers: Mapping[str, Node], name: str) -> HostFunction:
    """What computes a small tensor on the host: an input, a constant, or a native op over those.

    Raises UnsupportedModelError for anything else.
    """
    from espalier.ir.ops import OPS

    if name in graph.constants:
        constant = np.asarray(graph.constants[name])
        return lambda _feeds, _batch, _seq: constant
    node = producers.get(name)
    if node is None:
        return lambda feeds, _batch, _seq: feeds[name]
    if node.op == "Positions":
        offset = node.attrs["offset"]
        return lambda _feeds, _batch, seq: np.arange(offset, offset + seq, dtype=np.int32)[None]
    if node.op not in ("PositionsFromIds", "RelativeBias"):
        raise UnsupportedModelError(f"{name!r} is computed by {node.op}, which cannot feed an index or a bias")
    operands = [host_function(graph, producers, operand) for operand in node.inputs]
    spec, attrs = OPS[node.op], node.attrs
    return lambda feeds, batch, seq: spec.apply([operand(feeds, batch, seq) for operand in operands], attrs)


def bias_function(
    graph: Graph, producers: Mapping[str, Node], name: str, layout: Callable[[HostFunction], HostFunction]
) -> HostFunction:
    """What computes an attention bias in a backend's ``layout``; kept from run to run where only lengths matter."""
    function = layout(host_function(graph, producers, name))
    fixed = name in producers or name in graph.constants
    return _remember_last(function) if fixed else function


def _remember_last(function: HostFunction) -> HostFunction:
    """Keep the result for the last sequence length: it depends on nothing else."""
    last: list[tuple[int, np.ndarray]] = []

    def remembered(feeds: dict[str, np.ndarray], batch: int, seq: int) -> np.ndarray:
        for known, array in last:
            if known == seq:
                return array
        array = function(feeds, batch, seq)
        last[:] = [(seq, array)]
        return array

    return remembered
