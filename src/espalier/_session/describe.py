"""How a session describes its inputs and outputs: ONNX Runtime's way."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.ir.graph import TensorType

_ELEMENTS = {
    "float32": "float",
    "float64": "double",
    "str": "string",
    "object": "string",
}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output as ONNX Runtime describes it: ``type`` like ``tensor(int64)``, unknown extents None."""

    name: str
    shape: list[int | str | None]
    type: str


def describe(name: str, kind: TensorType | None) -> TensorInfo:
    """The description of a value of the graph."""
    if kind is None:
        return TensorInfo(name, [], "")
    extents = [None if isinstance(dim, str) and dim.startswith("?") else dim for dim in kind.shape or ()]
    return TensorInfo(name, extents, f"tensor({_ELEMENTS.get(kind.dtype, kind.dtype)})")
