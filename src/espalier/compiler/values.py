"""What lowering knows of a tensor: a value of the engine, or one that is put off until its reader is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.images import Window

Static = tuple[float, float]
"""Scale and zero point of activations, the latter as unsigned integers have it."""


@dataclass
class Value:
    """A value in the engine: features ``[first, first + width)`` of the value ``id``.

    ``lanes``: of each sequence; 0 for one per token.
    """

    id: int
    lanes: int
    first: int
    width: int
    whole: bool


@dataclass(frozen=True)
class Linear:
    """A linear layer that its reader may take over: one that adds a residual, one that applies an activation."""

    node: Node
    residual: int = -1


@dataclass(frozen=True)
class Shown:
    """What a window shows of the value ``source``, for a linear layer to read."""

    source: str
    window: Window
    align: int


@dataclass
class Rounded:
    """Integers whose floats nobody has asked for yet."""

    integers: Value
    static: Static | None
    label: str


@dataclass
class Sum:
    """Embedding rows to be added up, not emitted yet."""

    tables: list[tuple[Any, np.ndarray | None, int]]
    width: int
