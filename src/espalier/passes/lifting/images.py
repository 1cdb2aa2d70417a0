"""Images: views ``[B, F, rows, columns]`` of a token tensor that holds an image's pixels row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.ir.images import MOST_PIXELS, REACH, Pair, Window
from espalier.ir.ops import MOST_PARTS
from espalier.passes.lifting.axes import BATCH, FEATURE, TOKEN, Axes, axis, extent
from espalier.passes.lifting.lifter import Lifter
from espalier.passes.lifting.values import BF, BSF, Constant, Opaque, Tensor, Value, View
from espalier.passes.symbolic import ONE, Expr

SPATIAL = {2, 3}
"""The axes of an image's rows and columns."""


def image_axes(base: Tensor, grid: Pair) -> Axes:
    """The axes of an image as ONNX has it; ``base`` are its pixels."""
    rows, columns = grid
    return (
        axis(BATCH, base.batch),
        axis(FEATURE, base.features),
        axis(TOKEN, rows, columns),
        axis(TOKEN, columns),
    )


def pixel_axes(base: Tensor, grid: Pair) -> Axes:
    """The same with the features last, as rows of a linear layer."""
    batch, features, rows, columns = image_axes(base, grid)
    return (batch, rows, columns, features)


def grid_of(value: Value | None) -> Pair | None:
    """Rows and columns if the value is an image whose pixels are a native tensor."""
    if not isinstance(value, View) or value.base.integer or value.base.layout not in (BSF, BF) or len(value.axes) != 4:
        return None
    rows, columns = (extent(one).number for one in value.axes[2:])
    if rows is None or columns is None or value.axes != image_axes(value.base, (rows, columns)):
        return None
    return rows, columns


def image(lift: Lifter, value: Value | None, name: str) -> View | None:
    """The value as an image; what ONNX Runtime or the caller gives is taken apart into pixels."""
    if grid_of(value) and isinstance(value, View):
        return value
    if not (isinstance(value, Opaque) or _of_input(lift, value)) or lift.dtype(name) != "float32":
        return None
    shape = lift.shape(name)
    if shape is None or len(shape) != 4:
        return None
    features, rows, columns = (size.number for size in shape[1:])
    if not features or not rows or not columns:
        return None
    pixels = Tensor("", BSF, shape[0], Expr.of(rows * columns), features)
    view = lift.emit("ImageToTokens", [name], {}, pixels)
    return single(lift, View(view.base, image_axes(view.base, (rows, columns))), "")


def _of_input(lift: Lifter, value: Value | None) -> bool:
    """Whether the value is an input in another order, such as one whose channels come last: ONNX Runtime turns it."""
    if not isinstance(value, View):
        return False
    return any(node.op == "ImageToTokens" and node.outputs == [value.base.name] for node in lift.nodes)


def single(lift: Lifter, view: View, name: str) -> View:
    """An image of one pixel as a tensor with a row per sequence, so that what is one by nature is one everywhere."""
    base = view.base
    if base.layout != BSF or base.tokens != 1:
        return view
    tensor = Tensor("", BF, base.batch, ONE, base.features)
    return lift.emit("SelectToken", [base.name], {"index": 0}, tensor, axes=view.axes, name=name)


def exported(lift: Lifter, name: str, view: View) -> str:
    """An image as ONNX has it, for what is not native: the name of a native value that holds it, "" for no image."""
    grid = grid_of(view)
    if grid is None or lift.dtype(name) not in ("float32", "float16", "unknown"):
        return ""
    tokens = lift.solid(view)
    if tokens.layout == BF:
        tokens = lift.emit(
            "Spread", [tokens.name], {"tokens": 1}, Tensor("", BSF, tokens.batch, ONE, tokens.features)
        ).base
    shape = [tokens.batch, Expr.of(tokens.features), Expr.of(grid[0]), Expr.of(grid[1])]
    attrs = {"rows": grid[0], "columns": grid[1]}
    return lift.emit_image([tokens.name], attrs, shape, name)


def channel_vector(view: View, array: np.ndarray) -> bool:
    """Whether a constant has one number per feature of an image."""
    if grid_of(view) is None or array.ndim not in (3, 4) or array.size != view.base.features:
        return False
    return bool(array.shape[-3] == array.size)


def window(lift: Lifter, source: Pair, kernel: tuple[int, ...], attrs: dict[str, Any], output: str) -> Window | None:
    """The window of a convolution or pool over an image of ``source`` rows and columns; ``output`` names its result."""
    stride, dilation = ((*map(int, attrs.get(key) or (1, 1)),) for key in ("strides", "dilations"))
    pads = [int(n) for n in attrs.get("pads") or (0, 0, 0, 0)]
    mode = attrs.get("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if len(kernel) != 2 or len(stride) != 2 or len(dilation) != 2 or len(pads) != 4 or min(pads) < 0:
        return None
    if min(*kernel, *stride, *dilation) < 1 or max(*kernel, *stride, *dilation, *pads) > REACH:
        return None
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        result = [-(-size // s) for size, s in zip(source, stride, strict=True)]
        missing = [max(0, (n - 1) * s + r - size) for n, s, r, size in zip(result, stride, reach, source, strict=True)]
        before = [m // 2 if mode == "SAME_UPPER" else m - m // 2 for m in missing]
    elif mode in ("NOTSET", "VALID", ""):
        pads = [0] * 4 if mode == "VALID" else pads
        before = pads[:2]
        free = [size + a + b - r for size, a, b, r in zip(source, before, pads[2:], reach, strict=True)]
        if min(free) < 0:
            return None
        ceil = int(attrs.get("ceil_mode", 0))
        result = [(-(-n // s) if ceil else n // s) + 1 for n, s in zip(free, stride, strict=True)]
        if ceil:  # a window must begin within the image
            limits = [-(-(size + a) // s) for size, a, s in zip(source, before, stride, strict=True)]
            result = [min(pair) for pair in zip(result, limits, strict=True)]
    else:
        return None
    declared = lift.declared(output)
    if declared is not None and [n.number or want for n, want in zip(declared[2:], result, strict=False)] != result:
        return None
    pairs = [(int(a), int(b)) for a, b in (source, result, kernel, stride, dilation, before)]
    fits = min(result) > 0 and max(source[0] * source[1], result[0] * result[1]) <= MOST_PIXELS
    return Window(*pairs) if fits else None


def mean(lift: Lifter, view: View, keep: bool, name: str) -> View | None:
    """The mean of every plane."""
    if grid_of(view) is None:
        return None
    tokens = lift.solid(view)
    kept = ((), ()) if keep else ()
    axes = (*view.axes[:2], *kept)
    if tokens.layout == BF:
        return View(tokens, axes)
    tensor = Tensor("", BF, tokens.batch, ONE, tokens.features)
    return lift.emit("MaskedMean", [tokens.name], {"epsilon": 1e-9}, tensor, axes=axes, name=name)


def spread(lift: Lifter, one: View, other: View) -> tuple[View, View] | None:
    """Two images of which one may have a single pixel, as two of the same extents."""
    grids = grid_of(one), grid_of(other)
    if None in grids or one.base.features != other.base.features or one.base.batch != other.base.batch:
        return None
    if {one.base.layout, other.base.layout} != {BF, BSF}:
        return None
    few, many = (one, other) if one.base.layout == BF else (other, one)
    solid = lift.solid(few)
    tokens = many.base.tokens.number
    wide = lift.emit(
        "Spread", [solid.name], {"tokens": tokens}, Tensor("", BSF, solid.batch, Expr.of(tokens or 1), solid.features)
    )
    full = View(wide.base, many.axes)
    return (full, many) if few is one else (many, full)


def concat(lift: Lifter, values: list[Value | None], along: int, name: str) -> View | None:
    """Features one after the other: of images, or of rows."""
    views = [value for value in values if isinstance(value, View) and not value.base.integer]
    if not 2 <= len(views) == len(values) <= MOST_PARTS or any(view.base.layout not in (BSF, BF) for view in views):
        return None
    first, k = views[0], along % len(views[0].axes)
    for view in views:
        rest = [one for j, one in enumerate(view.axes) if j != k]
        alike = view.base.layout == first.base.layout and rest == [one for j, one in enumerate(first.axes) if j != k]
        if not alike or view.axes[k] != axis(FEATURE, view.base.features):
            return None
        if any(atom.label == FEATURE for one in rest for atom in one):
            return None
    solids = [lift.solid(view) for view in views]
    features = sum(solid.features for solid in solids)
    base = first.base
    axes = tuple(axis(FEATURE, features) if j == k else one for j, one in enumerate(first.axes))
    tensor = Tensor("", base.layout, base.batch, base.tokens, features)
    return lift.emit("Concat", [solid.name for solid in solids], {}, tensor, axes=axes, name=name)


def bounded(lift: Lifter, view: View, op: str, limit: float, name: str) -> View | None:
    """``Max`` or ``Min`` with a number."""
    if view.base.integer or view.base.layout not in (BSF, BF):
        return None
    solid = lift.solid(view)
    tensor = Tensor("", solid.layout, solid.batch, solid.tokens, solid.features)
    return lift.emit(op, [solid.name, lift.scalar(limit)], {}, tensor, axes=view.axes, name=name)


def number(value: Value | None) -> float | None:
    """A constant of one element."""
    if isinstance(value, Constant) and value.array.size == 1 and value.array.dtype.kind in "fiu":
        return float(value.array.reshape(-1)[0])
    return None
