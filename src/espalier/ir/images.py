"""Images as sequences of pixels: windows, and the NumPy bodies and rules of inference of the operations on them.

Notation as in :mod:`espalier.ir.ops`: an image ``[B, F, rows, columns]`` is the token tensor ``[B, P, F]`` of its
``P = rows * columns`` pixels, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import GraphError
from espalier.ir.graph import Dim, TensorType
from espalier.ir.inference import compatible

Array = NDArray[Any]
Pair = tuple[int, int]
"""Rows, columns."""
REACH = 1 << 15
"""The largest kernel, stride, dilation or edge."""
MOST_PIXELS = 1 << 26
"""Of an image."""


@dataclass(frozen=True)
class Window:
    """How pixels of one image read another: output ``(y, x)`` reads for each tap ``(i, j)`` the input
    ``(y * stride[0] - before[0] + i * dilation[0], x * stride[1] - before[1] + j * dilation[1])``.

    ``source``, ``result``: rows and columns of the two images; ``before``: rows above and columns on the left that lie
    beyond the edges.
    """

    source: Pair
    result: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Window:
        """From an attribute's numbers, as :attr:`numbers` gives them. Raises GraphError."""
        whole = all(type(n) is int for n in numbers)
        if len(numbers) != 12 or not whole or min(numbers[:10]) < 1 or min(numbers[10:]) < 0:
            raise GraphError(
                "a window is 12 whole numbers, rows and columns of source, result, kernel, stride and dilation "
                f"(from 1) and before (from 0); got {list(numbers)}"
            )
        if max(numbers[4:]) > REACH or max(numbers[0] * numbers[1], numbers[2] * numbers[3]) > MOST_PIXELS:
            raise GraphError(
                f"a window's kernel, strides, dilations and edges go to {REACH}, its images to {MOST_PIXELS} pixels; "
                f"got {list(numbers)}"
            )
        return cls(*((numbers[i], numbers[i + 1]) for i in range(0, 12, 2)))

    @property
    def numbers(self) -> list[int]:
        """As an attribute."""
        return [number for pair in astuple(self) for number in pair]

    @property
    def pairs(self) -> tuple[Pair, Pair, Pair, Pair, Pair, Pair]:
        """As the engine takes it."""
        return (self.source, self.result, self.kernel, self.stride, self.dilation, self.before)

    @property
    def taps(self) -> int:
        """Inputs that an output reads."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of the result."""
        return self.result[0] * self.result[1]

    @property
    def always_sees(self) -> bool:
        """Whether every output reads some input, and not edges alone."""
        for i in (0, 1):
            taps = np.arange(self.kernel[i]) * self.dilation[i] - self.before[i]
            at = np.arange(self.result[i])[:, None] * self.stride[i] + taps
            if not ((at >= 0) & (at < self.source[i])).any(axis=1).all():
                return False
        return True

    @property
    def is_whole_image(self) -> bool:
        """Whether every output reads just the input in its place."""
        return self.taps == 1 and self.stride == (1, 1) and self.before == (0, 0) and self.source == self.result


def aligned(features: int, align: int) -> int:
    """Features rounded up to a multiple of ``align``."""
    return -(-features // align) * align


def _taps(x: Array, window: Window, edge: float) -> Array:
    """``[B, taps, P, F]``: what each tap reads, ``edge`` beyond the edges."""
    batch, _, features = x.shape
    rows, columns = window.source
    image = x.reshape(batch, rows, columns, features)
    at = [
        np.arange(count)[None] * stride - before + np.arange(kernel)[:, None] * dilation
        for count, stride, before, kernel, dilation in zip(
            window.result, window.stride, window.before, window.kernel, window.dilation, strict=True
        )
    ]
    inside = [(n >= 0) & (n < size) for n, size in zip(at, window.source, strict=True)]
    y, x_ = np.clip(at[0], 0, rows - 1), np.clip(at[1], 0, columns - 1)
    taken = image[:, y[:, None, :, None], x_[None, :, None, :]]  # [B, kernel rows, kernel columns, rows, columns, F]
    kept = (inside[0][:, None, :, None] & inside[1][None, :, None, :])[None, ..., None]
    return np.asarray(np.where(kept, taken, np.float32(edge))).reshape(batch, window.taps, window.pixels, features)


# ---- bodies ----------------------------------------------------------------------------------------------------------


def unfold(x: Array, window: Sequence[int], align: int) -> Array:
    shape = Window.of(window)
    taps = _taps(x, shape, 0.0).transpose(0, 2, 1, 3)  # [B, P, taps, F]
    padding = aligned(x.shape[-1], align) - x.shape[-1]
    wide = np.pad(taps, ((0, 0), (0, 0), (0, 0), (0, padding)))
    return np.ascontiguousarray(wide.reshape(*wide.shape[:2], -1), np.float32)


def max_pool(x: Array, window: Sequence[int]) -> Array:
    # NaN is never the largest. To ONNX Runtime it is or is not, by its place in the window.
    largest: Array = np.fmax.reduce(_taps(x, Window.of(window), -np.inf), axis=1, initial=-np.inf)
    return largest.astype(np.float32)


def mean_pool(x: Array, window: Sequence[int], count_edges: bool) -> Array:
    shape = Window.of(window)
    total = _taps(x, shape, 0.0).astype(np.float64).sum(axis=1)
    ones = np.ones((1, x.shape[1], 1), np.float32)
    count = shape.taps if count_edges else np.maximum(_taps(ones, shape, 0.0).sum(axis=1), 1)
    return np.asarray(total / count, np.float32)


def image_to_tokens(x: Array) -> Array:
    return np.ascontiguousarray(x.reshape(*x.shape[:2], -1).transpose(0, 2, 1), np.float32)


def tokens_to_image(x: Array, rows: int, columns: int) -> Array:
    return np.ascontiguousarray(x.transpose(0, 2, 1).reshape(len(x), -1, rows, columns), np.float32)


def concat(*parts: Array | None) -> Array:
    return np.concatenate([part for part in parts if part is not None], axis=-1)


def spread(x: Array, tokens: int) -> Array:
    return np.repeat(x[:, None], tokens, axis=1)


# ---- rules of inference ----------------------------------------------------------------------------------------------


def _pixels(op: str, x: TensorType, window: Window) -> tuple[Dim, Dim]:
    """Batch and features of an operand that must be the image a window reads."""
    wanted = window.source[0] * window.source[1]
    if x.shape is None:
        return "?", "?"
    if len(x.shape) != 3 or (isinstance(x.shape[1], int) and x.shape[1] != wanted):
        raise GraphError(f"{op}: x must be [batch, {wanted}, features] for a window over {window.source}, got {x}")
    return x.shape[0], x.shape[2]


def unfold_type(x: TensorType, window: Sequence[int], align: int) -> TensorType:
    shape = Window.of(window)
    if align < 1:
        raise GraphError(f"Unfold: align must be positive, got {align}")
    batch, features = _pixels("Unfold", x, shape)
    wide = shape.taps * aligned(features, align) if isinstance(features, int) else "?"
    return TensorType("float32", (batch, shape.pixels, wide))


def pool_type(op: str) -> Callable[..., TensorType]:
    def rule(x: TensorType, window: Sequence[int], **_attrs: object) -> TensorType:
        shape = Window.of(window)
        batch, features = _pixels(op, x, shape)
        return TensorType("float32", (batch, shape.pixels, features))

    return rule


def image_to_tokens_type(x: TensorType) -> TensorType:
    if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[2], int) or not isinstance(x.shape[3], int):
        raise GraphError(f"ImageToTokens: x must be [batch, features, rows, columns] with known extents, got {x}")
    return TensorType("float32", (x.shape[0], x.shape[2] * x.shape[3], x.shape[1]))


def tokens_to_image_type(x: TensorType, rows: int, columns: int) -> TensorType:
    if min(rows, columns) < 1:
        raise GraphError(f"TokensToImage: rows and columns must be positive, got {rows} and {columns}")
    shape = ("?", "?", "?") if x.shape is None else x.shape
    if len(shape) != 3 or (isinstance(shape[1], int) and shape[1] != rows * columns):
        raise GraphError(f"TokensToImage: x must be [batch, {rows * columns}, features], got {x}")
    return TensorType("float32", (shape[0], shape[2], rows, columns))


def concat_type(*parts: TensorType | None) -> TensorType:
    shapes = [part.shape for part in parts if part is not None]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return TensorType("float32", None)
    if any(len(shape) not in (2, 3) for shape in known):
        raise GraphError(f"Concat: the operands must be [batch, seq, features] or [batch, features], got {known}")
    if any(not compatible(one[:-1], other[:-1]) for one, other in combinations(known, 2)):
        raise GraphError(f"Concat: the operands must differ in their features alone, got {known}")
    # A number says more than a symbol.
    rest = [next((n for n in extents if isinstance(n, int)), extents[0]) for extents in zip(*known, strict=False)][:-1]
    widths = [shape[-1] for shape in known]
    total = sum(w for w in widths if isinstance(w, int)) if all(isinstance(w, int) for w in widths) else "?"
    return TensorType("float32", (*rest, total))


def spread_type(x: TensorType, tokens: int) -> TensorType:
    shape = ("?", "?") if x.shape is None else x.shape
    if len(shape) != 2 or tokens < 1:
        raise GraphError(f"Spread: x must be [batch, features] and tokens positive, got {x} and {tokens}")
    return TensorType("float32", (shape[0], tokens, shape[1]))
