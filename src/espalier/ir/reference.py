"""Run a native graph with the NumPy bodies of its ops: the meaning every executor is held to. Slow on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import GraphError, InputNameError, InputShapeError, InputTypeError
from espalier.ir.graph import Dim, Graph
from espalier.ir.ops import OPS


def run(graph: Graph, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Compute ``graph.outputs`` from one array per graph input, by name.

    Raises GraphError for a foreign or unknown node, InputNameError, InputTypeError and InputShapeError for feeds
    that do not fit the inputs' types (a symbol must have one value throughout).
    """
    _check_feeds(graph, feeds)
    values: dict[str, NDArray[Any]] = dict(graph.constants) | {name: np.asarray(feeds[name]) for name in graph.inputs}
    for node in graph.nodes:
        if not node.is_native:
            raise GraphError(
                f"{node.op} {node.name!r} of domain {node.domain or 'ai.onnx'!r} is not native; the reference runs "
                "native nodes only. Run this graph through a session, which gives such nodes to ONNX Runtime"
            )
        spec = OPS.get(node.op)
        if spec is None:
            raise GraphError(f"{node.op} is no op of the native dialect; expected one of {', '.join(OPS)}")
        unknown = [name for name in node.inputs if name and name not in values]
        if unknown:
            raise GraphError(f"{node.op} {node.name!r} reads {unknown[0]!r}, which nothing made; run ir.verify first")
        values[node.outputs[0]] = spec.apply([values[name] if name else None for name in node.inputs], node.attrs)
    return {name: values[name] for name in graph.outputs}


def _check_feeds(graph: Graph, feeds: Mapping[str, NDArray[Any]]) -> None:
    expected = ", ".join(graph.inputs)
    for name in feeds:
        if name not in graph.inputs:
            raise InputNameError(f"there is no input {name!r}; expected: {expected}")
    symbols: dict[str, tuple[int, str]] = {}
    for name in graph.inputs:
        if name not in feeds:
            raise InputNameError(f"input {name!r} is missing; expected: {expected}")
        array = np.asarray(feeds[name])
        kind = graph.types[name]
        if array.dtype.name != kind.dtype:
            raise InputTypeError(f"input {name!r} must be of dtype {kind.dtype}, got {array.dtype.name}")
        if kind.shape is None:
            continue
        if array.ndim != len(kind.shape):
            raise InputShapeError(f"input {name!r} must have shape {kind}, got {list(array.shape)}")
        for axis, (dim, extent) in enumerate(zip(kind.shape, array.shape, strict=True)):
            wanted, source = _expected_extent(symbols, dim, extent, name)
            if extent != wanted:
                raise InputShapeError(
                    f"input {name!r} must have extent {wanted} ({source}) on axis {axis}, got {list(array.shape)}"
                )


def _expected_extent(symbols: dict[str, tuple[int, str]], dim: Dim, extent: int, name: str) -> tuple[int, str]:
    if isinstance(dim, int):
        return dim, "fixed by the model"
    if dim.startswith("?"):
        return extent, ""
    return symbols.setdefault(dim, (extent, f"{dim}, as in {name!r}"))
