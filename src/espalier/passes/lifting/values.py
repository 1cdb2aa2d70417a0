"""What the lifter knows of a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from espalier.passes.lifting.axes import BATCH, FEATURE, TOKEN, Axes, Axis, axis
from espalier.passes.symbolic import Expr

BSF, SF, BF, BS = "BSF", "1SF", "BF", "BS"
"""Layouts of native tensors, one letter per axis; ``1`` is an axis of extent 1."""


@dataclass(frozen=True)
class Tensor:
    """A native value: its name, layout and extents. ``batch`` or ``tokens`` of 1 where the layout has none."""

    name: str
    layout: str
    batch: Expr
    tokens: Expr
    features: int = 1
    integer: bool = False

    def axes(self) -> Axes:
        """The axes of the tensor as it is laid out."""
        by_letter: dict[str, Axis] = {
            "B": axis(BATCH, self.batch),
            "S": axis(TOKEN, self.tokens),
            "F": axis(FEATURE, self.features),
        }
        by_letter["1"] = ()
        by_letter["H"] = by_letter["F"]
        return tuple(by_letter[letter] for letter in self.layout)


class Value:
    """Nothing is known: the node that made it stays foreign. Subclasses know more."""


@dataclass
class Opaque(Value):
    """A value only ONNX Runtime can make. ``shape`` holds symbolic extents when the rank is known."""

    shape: list[Expr] | None = None
    why: str = ""


@dataclass
class Constant(Value):
    """A constant of the graph, by name; ``array`` is it."""

    name: str
    array: np.ndarray


@dataclass
class Extents(Value):
    """A small integer tensor whose entries are expressions of the extents (object array of Expr)."""

    array: np.ndarray


@dataclass
class View(Value):
    """``scale`` times a rearrangement of a native tensor."""

    base: Tensor
    axes: Axes
    scale: float = 1.0

    def plain(self) -> bool:
        """Whether the value is the native tensor itself."""
        return self.scale == 1.0 and self.axes == self.base.axes()


@dataclass
class Row(Value):
    """A float vector ``[F]`` that is the same for every token (an embedding of a constant id)."""

    array: np.ndarray
    shape: list[Expr]


@dataclass
class OneHot(Value):
    """The one-hot rows of ids; its last axis is the class."""

    ids: View
    depth: int


@dataclass
class Lengths(Value):
    """Valid tokens per sequence ``[B]``: how many entries of an input ``[B, S]`` are 1."""

    mask: str


@dataclass
class Scores(Value):
    """``scale * q k^T`` plus masks, with axes of atoms B, F (the head), S (query) and K (key)."""

    q: Tensor
    k: Tensor
    heads: int
    axes: Axes
    scale: float
    key_mask: str = ""
    mask_value: float = 0.0
    bias: list[str] = field(default_factory=list)
    normal: bool = False
    """True after Softmax over the keys."""
    nan: bool = False
    """True for ``IsNaN`` of the softmax, which exporters use to clean up rows without any valid key."""


@dataclass
class Masked(Value):
    """A token tensor times its mask; ``summed`` once added up over the tokens (axes then have no token)."""

    x: View
    mask: str
    axes: Axes
    summed: bool = False


Recognised = tuple[str, str, dict[str, Any]]
"""What a region computes: (kind, source value, attributes)."""
