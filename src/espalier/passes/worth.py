"""Whether to run a graph natively, or leave it to ONNX Runtime as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from espalier.ir.graph import Graph, Node, node_reads

HEAVY = frozenset({"Linear", "QLinear", "Attention"})
"""Native operations whose work is worth an engine."""
_LOOKUPS = frozenset({"Embedding", "Gather", "GatherND", "GatherElements"})


class _Costs(NamedTuple):
    """Of a layer on pixels: per multiply-add in ONNX Runtime; per weight in blocks of (outputs, inputs), zeros in them
    included, ``(0, 0)`` being dense; per output, for what surrounds the layer.
    """

    theirs: float
    blocks: tuple[tuple[tuple[int, int], float], ...]
    around: float


# Fitted to ResNet-50's shape on two cores of Zen 3, dense to 95 % zeros, batches of 1 and 8.
_FLOAT = _Costs(1.0, (((0, 0), 1.0), ((1, 1), 2.0), ((4, 1), 1.15)), 20.0)
_INTEGER = _Costs(0.53, (((0, 0), 0.6), ((1, 4), 0.6)), 40.0)
_GATHERED = 30.0
"""Per input that a window shows of a pixel."""


def not_worth_it(graph: Graph, *, images: bool = True) -> str:
    """Why running parts of this graph natively would not pay, or "" when it does. ``images``: see ``partition``."""
    if not images and any(node.op == "ImageToTokens" for node in graph.nodes):
        return "the executor has no convolutions"
    if not any(node.is_native and node.op in HEAVY for node in graph.nodes):
        return "there is no linear layer or attention beside it to run natively"
    sizes = {name: array.size for name, array in graph.constants.items() if array.ndim >= 2}
    native = sum(_weight(node, sizes) for node in graph.nodes if node.is_native)
    foreign = sum(_weight(node, sizes) for node in graph.nodes if not node.is_native)
    if native < foreign:
        share = native / (native + foreign)
        return f"only {share:.0%} of the weights could run natively; the copies between the parts do not pay"
    ours, theirs = convolution_costs(graph)
    if ours > theirs:
        return "its convolutions have too few zeros: ONNX Runtime is expected to be faster with them"
    return ""


def convolution_costs(graph: Graph) -> tuple[float, float]:
    """Estimates of what the engine and ONNX Runtime take for a graph's layers on pixels, in the latter's multiply-adds
    of dense float32. Nothing for a graph without convolutions.
    """
    windows = {name for node in graph.nodes if node.op == "Unfold" for name in node.outputs}
    ours = theirs = 0.0
    for node in graph.nodes if windows else ():
        shape = graph.types[node.outputs[0]].shape if node.op in ("Linear", "QLinear") else None
        if shape is None or len(shape) != 3 or not isinstance(shape[1], int):
            continue
        weight = np.asarray(graph.constants[node.inputs[1]])
        zero = node.inputs[3] if node.op == "QLinear" and len(node.inputs) > 3 else ""
        kept = weight != (np.asarray(graph.constants[zero]).reshape(-1, 1) if zero else 0)
        rows, columns = weight.shape
        costs = _INTEGER if node.op == "QLinear" else _FLOAT
        layer = min(share * cost for share, cost in ((_kept(kept, *block), cost) for block, cost in costs.blocks))
        moved = (_GATHERED * columns if node.inputs[0] in windows else 0) + costs.around * rows
        ours += shape[1] * (layer * weight.size + moved)
        theirs += shape[1] * costs.theirs * weight.size
    return ours, theirs


def _kept(kept: np.ndarray, height: int, width: int) -> float:
    """The share of blocks that hold a nonzero; 1 for blocks of nothing, which is dense."""
    if not height:
        return 1.0
    rows, columns = (-(-size // step) * step for size, step in zip(kept.shape, (height, width), strict=True))
    padded = np.zeros((rows, columns), bool)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return float(padded.reshape(rows // height, height, columns // width, width).any(axis=(1, 3)).mean())


def _weight(node: Node, sizes: dict[str, int]) -> int:
    """Weights a node multiplies by: a measure of its work. Tables that are only looked up cost nothing."""
    if node.op in _LOOKUPS:
        return 0
    own = sum(sizes.get(name, 0) for name in set(node_reads(node)))
    return own + (_inner_weights(node.proto) if node.proto is not None else 0)


def _inner_weights(proto: Any) -> int:
    total = 0
    for attribute in proto.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            total += sum(int(np.prod(tensor.dims)) for tensor in body.initializer if len(tensor.dims) >= 2)
            total += sum(_inner_weights(inner) for inner in body.node)
    return total
