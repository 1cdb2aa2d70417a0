"""What the lifter knows of a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.images import Window
from espalier.ir.quantization import dequantize
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


class Rounding(NamedTuple):
    """What a FakeQuantize reads: the value before, and the constants of scale and zero point, all by name."""

    source: str
    scale: str
    zero: str


class Value:
    """Nothing is known: the node that made it stays foreign. Subclasses know more."""


@dataclass
class Opaque(Value):
    """A value only ONNX Runtime can make. ``shape`` holds symbolic extents when the rank is known."""

    shape: list[Expr] | None = None
    why: str = ""


@dataclass
class Unrounded(Opaque):
    """What masks are made of, without the rounding to 8 bits that the graph has there; ``name`` is it before."""

    name: str = ""


@dataclass
class Constant(Value):
    """A constant of the graph, by name; ``array`` is it."""

    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return str(self.array.dtype.name)


class Dequantized(Constant):
    """A constant ``(q - zero) * scale`` of integers ``q``, which becomes dense only where ``array`` is asked for.

    ``scale`` and ``zero`` are numbers (``[]``) or vectors along ``axis`` of ``q``.
    """

    def __init__(self, name: str, q: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int = 0) -> None:
        self.name, self.q, self.scale, self.zero, self.axis = name, q, scale, zero, axis

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def dtype(self) -> str:
        return "float32"

    @cached_property
    def array(self) -> np.ndarray:  # type: ignore[override]
        along = [1] * self.q.ndim
        if self.scale.ndim or self.zero.ndim:
            along[self.axis] = self.q.shape[self.axis]
        scale, zero = (np.reshape(a, along) if a.ndim else a for a in (self.scale, self.zero))
        return dequantize(self.q, scale, zero)

    def scaled(self, factor: np.ndarray | np.float32) -> Dequantized:
        """The constant times ``factor``, a number or a vector along ``axis``."""
        return Dequantized(self.name, self.q, np.asarray(self.scale * factor), self.zero, self.axis)

    def transposed(self, name: str, perm: list[int]) -> Dequantized:
        """The constant with its axes in another order."""
        return Dequantized(name, self.q.transpose(perm), self.scale, self.zero, perm.index(self.axis))


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
    rounded: bool = False
    """True when a quantisation of the scores was left out."""
    nan: bool = False
    """True for ``IsNaN`` of the softmax, which exporters use to clean up rows without any valid key."""


@dataclass
class Masked(Value):
    """A token tensor times its mask; ``summed`` once added up over the tokens (axes then have no token)."""

    x: View
    mask: str
    axes: Axes
    summed: bool = False


@dataclass
class Quantized(Value):
    """The integers of ``x``, which holds rounded values: ``x = (q - zero) * scale`` with numbers for both."""

    x: Value
    scale: np.ndarray
    zero: np.ndarray


@dataclass
class Dynamic(Value):
    """The integers of ``x`` under a scale and zero point computed from it; ``scale`` and ``zero`` name those values."""

    x: View
    scale: str
    zero: str


@dataclass
class Rows(Value):
    """Rows of a constant of integers that ``node``, a Gather, looks up; their scale is not known yet."""

    node: Node
    table: Constant


@dataclass
class Factor(Value):
    """A product of dynamic scales, by name, and a constant (None for none)."""

    scales: tuple[str, ...]
    constant: np.ndarray | None = None


@dataclass
class Product(Value):
    """``sum (q - zero) * (w - zero) + bias`` in integers; a weight is ``[K, M]`` in steps of 1.

    ``missing``: the dynamic scales that it was not multiplied by yet; ``constant``: the constants that it was, None
    before the first. With a ``window`` it is a convolution, by a weight ``[M, K, ...]``.
    """

    left: Quantized | Dynamic
    right: Dequantized | Dynamic
    missing: tuple[str, ...]
    constant: np.ndarray | None = None
    bias: np.ndarray | None = None
    window: Window | None = None


def rows(value: Value | None) -> View | None:
    """The value as rows of features: a float view whose last axis is all of its tensor's features."""
    if not isinstance(value, View) or value.base.integer or value.base.layout not in (BSF, SF, BF) or not value.axes:
        return None
    whole = value.axes[-1] == axis(FEATURE, value.base.features)
    inner = any(atom.label == FEATURE for one in value.axes[:-1] for atom in one)
    return value if whole and not inner else None


def widened(value: View, features: int) -> Axes:
    return (*value.axes[:-1], axis(FEATURE, features))


Recognised = tuple[str, str, dict[str, Any]]
"""What a region computes: (kind, source value, attributes)."""
