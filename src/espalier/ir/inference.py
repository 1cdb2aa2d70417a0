"""Rules of inference of the native dialect: from the types of an op's operands and its attributes to its result's type.

Every rule raises GraphError on operands that do not fit together. Notation as in :mod:`espalier.ir.ops`.
"""

from __future__ import annotations

from collections.abc import Callable

from espalier.errors import GraphError
from espalier.ir.graph import Dim, Shape, TensorType

# ---- extents ---------------------------------------------------------------------------------------------------------


def same(a: Dim, b: Dim) -> bool:
    """Whether two extents can be equal. Two numbers must be; a symbol's value is known only when running."""
    return a == b or isinstance(a, str) or isinstance(b, str)


def compatible(a: Shape | None, b: Shape | None) -> bool:
    """Whether two shapes can be equal."""
    return a is None or b is None or (len(a) == len(b) and all(map(same, a, b)))


def _meet(op: str, what: str, a: Dim, b: Dim) -> Dim:
    """The better known of two extents that must be equal: a number, else a name, else unknown."""
    if not same(a, b):
        raise GraphError(f"{op}: {what} must agree, got {a} and {b}")
    if isinstance(a, int):
        return a
    return b if isinstance(b, int) or a.startswith("?") else a


def _dims(op: str, name: str, kind: TensorType, rank: int) -> Shape:
    """The extents of an operand that must have ``rank`` of them."""
    if kind.shape is None:
        return ("?",) * rank
    if len(kind.shape) != rank:
        raise GraphError(f"{op}: operand {name!r} must have {rank} dimensions, got {kind}")
    return kind.shape


def _tensor_dims(op: str, kind: TensorType) -> Shape | None:
    """The extents of x, which must be a token or sequence tensor."""
    if kind.shape is not None and len(kind.shape) not in (2, 3):
        raise GraphError(f"{op}: x must be [batch, seq, features] or [batch, features], got {kind}")
    return kind.shape


# ---- rules of inference ----------------------------------------------------------------------------------------------


def positions(ids: TensorType, offset: int) -> TensorType:
    return TensorType("int64", (1, _dims("Positions", "ids", ids, 2)[1]))


def positions_from_ids(ids: TensorType, padding_idx: int) -> TensorType:
    return TensorType("int64", _dims("PositionsFromIds", "ids", ids, 2))


def embedding(table: TensorType, ids: TensorType) -> TensorType:
    features = _dims("Embedding", "table", table, 2)[1]
    return TensorType("float32", (*_dims("Embedding", "ids", ids, 2), features))


def relative_bias(table: TensorType, ids: TensorType, num_buckets: int, max_distance: int) -> TensorType:
    buckets, heads = _dims("RelativeBias", "table", table, 2)
    _meet("RelativeBias", "num_buckets and the rows of the table", num_buckets, buckets)
    # Half of the buckets are for keys to the right; of each half, half are exact and the rest logarithmic.
    if num_buckets < 4 or max_distance <= num_buckets // 4:
        raise GraphError(
            "RelativeBias: expected num_buckets >= 4 and max_distance > num_buckets / 4, "
            f"got num_buckets={num_buckets} and max_distance={max_distance}"
        )
    seq = _dims("RelativeBias", "ids", ids, 2)[1]
    return TensorType("float32", (1, heads, seq, seq))


def linear(x: TensorType, weight: TensorType, bias: TensorType | None, op: str = "Linear") -> TensorType:
    shape = _tensor_dims(op, x)
    rows, columns = _dims(op, "weight", weight, 2)
    if bias is not None:
        _meet(op, "the extent of bias and the rows of weight", _dims(op, "bias", bias, 1)[0], rows)
    if shape is None:
        return TensorType("float32", None)
    _meet(op, "the features of x and the columns of weight", shape[-1], columns)
    return TensorType("float32", (*shape[:-1], rows))


def qlinear(
    x: TensorType,
    weight: TensorType,
    weight_scale: TensorType,
    weight_zero: TensorType | None,
    bias: TensorType | None,
    x_scale: TensorType | None,
    x_zero: TensorType | None,
    activations: str,
) -> TensorType:
    rows = _dims("QLinear", "weight", weight, 2)[0]
    for name, kind in (("weight_scale", weight_scale), ("weight_zero", weight_zero)):
        if kind is not None and kind.shape != ():
            _meet("QLinear", f"the extent of {name} and the rows of weight", _dims("QLinear", name, kind, 1)[0], rows)
    if weight_zero is not None and weight_zero.dtype != weight.dtype:
        raise GraphError(f"QLinear: weight and weight_zero must be of one dtype, got {weight} and {weight_zero}")
    if activations == "token" and (x_scale is not None or x_zero is not None):
        raise GraphError("QLinear: expected no x_scale and x_zero with activations='token': each token has its own")
    if activations == "static":
        if x_scale is None or x_zero is None:
            raise GraphError("QLinear: activations='static' needs both x_scale and x_zero")
        fake_quantize(x, x_scale, x_zero)
    return linear(x, weight, bias, "QLinear")


def fake_quantize(x: TensorType, scale: TensorType, zero: TensorType) -> TensorType:
    _tensor_dims("FakeQuantize", x)
    _dims("FakeQuantize", "scale", scale, 0)
    _dims("FakeQuantize", "zero", zero, 0)
    return x


def layer_norm(x: TensorType, gamma: TensorType, beta: TensorType | None, epsilon: float) -> TensorType:
    shape = _tensor_dims("LayerNorm", x)
    for name, kind in (("gamma", gamma), ("beta", beta)):
        if kind is not None:
            extent = _dims("LayerNorm", name, kind, 1)[0]
            if shape is not None:
                _meet("LayerNorm", f"the features of x and the extent of {name}", shape[-1], extent)
    return x


def same_type(op: str) -> Callable[..., TensorType]:
    def rule(x: TensorType, **_attrs: object) -> TensorType:
        _tensor_dims(op, x)
        return x

    return rule


def binary(op: str) -> Callable[[TensorType, TensorType], TensorType]:
    def rule(x: TensorType, y: TensorType) -> TensorType:
        if x.shape is None or y.shape is None:
            return TensorType("float32", None)
        wide, low = (x.shape, y.shape) if len(x.shape) >= len(y.shape) else (y.shape, x.shape)
        _tensor_dims(op, TensorType("float32", wide))
        if len(low) == len(wide):
            return TensorType("float32", _one_shape(op, wide, low))
        if len(low) > 1:
            raise GraphError(f"{op}: expected tensors of one shape, or a constant of shape [F] or [], got {x} and {y}")
        if low:
            _meet(op, "features", wide[-1], low[0])
        return TensorType("float32", wide)

    return rule


def _one_shape(op: str, a: Shape, b: Shape) -> Shape:
    """The common shape of two tensors; an extent of 1 broadcasts over the batch, and only there."""
    first = max(a[0], b[0], key=lambda dim: dim != 1) if 1 in (a[0], b[0]) else _meet(op, "batch", a[0], b[0])
    names = ("seq", "features")[-(len(a) - 1) :]
    return (first, *(_meet(op, name, m, n) for name, m, n in zip(names, a[1:], b[1:], strict=True)))


def attention(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    key_mask: TensorType | None,
    bias: TensorType | None,
    heads: int,
    scale: float,
    mask_value: float,
) -> TensorType:
    op = "Attention"
    if heads < 1:
        raise GraphError(f"{op}: expected heads >= 1, got {heads}")
    shapes = [_dims(op, name, kind, 3) for name, kind in (("q", q), ("k", k), ("v", v))]
    batch, seq = (
        _meet(op, f"the {what} of q, k and v", _meet(op, f"the {what} of q and k", first, second), third)
        for what, (first, second, third) in zip(("batch", "seq"), zip(*shapes, strict=True), strict=False)
    )
    for name, shape in zip("qkv", shapes, strict=True):
        if isinstance(shape[2], int) and shape[2] % heads:
            raise GraphError(f"{op}: {heads} heads do not divide the {shape[2]} features of {name}")
    _meet(op, "the features of q and k", shapes[0][2], shapes[1][2])
    if key_mask is not None:
        rows, columns = _dims(op, "key_mask", key_mask, 2)
        batch = _meet(op, "the batch of q and key_mask", batch, rows)
        seq = _meet(op, "the seq of k and key_mask", seq, columns)
    if bias is not None:
        extents = _dims(op, "bias", bias, 4)
        for what, extent, wanted in zip(("batch", "heads", "seq"), extents[:3], (batch, heads, seq), strict=True):
            if extent != 1:
                _meet(op, f"{what} of bias and of q (or 1)", wanted, extent)
        _meet(op, "the last extent of bias and seq", seq, extents[3])
    return TensorType("float32", (batch, seq, shapes[2][2]))


def select_token(x: TensorType, index: int) -> TensorType:
    batch, seq, features = _dims("SelectToken", "x", x, 3)
    if isinstance(seq, int) and not -seq <= index < seq:
        raise GraphError(f"SelectToken: index {index} is outside a sequence of {seq} tokens")
    return TensorType("float32", (batch, features))


def masked_mean(x: TensorType, mask: TensorType | None, epsilon: float) -> TensorType:
    batch, seq, features = _dims("MaskedMean", "x", x, 3)
    if mask is None:
        return TensorType("float32", (batch, features))
    rows, columns = _dims("MaskedMean", "mask", mask, 2)
    _meet("MaskedMean", "seq of x and mask", seq, columns)
    return TensorType("float32", (_meet("MaskedMean", "batch of x and mask", batch, rows), features))


def slice_features(x: TensorType, start: int, stop: int, squeeze: bool) -> TensorType:
    shape = _tensor_dims("SliceFeatures", x)
    if not 0 <= start < stop:
        raise GraphError(f"SliceFeatures: expected 0 <= start < stop, got start={start} and stop={stop}")
    if squeeze and stop - start != 1:
        raise GraphError(f"SliceFeatures: squeeze needs one feature, got {stop - start}")
    if shape is None:
        return TensorType("float32", None)
    if isinstance(shape[-1], int) and stop > shape[-1]:
        raise GraphError(f"SliceFeatures: stop={stop} is beyond the {shape[-1]} features of x")
    return TensorType("float32", shape[:-1] if squeeze else (*shape[:-1], stop - start))


def cast(x: TensorType, dtype: str) -> TensorType:
    return TensorType(dtype, x.shape)
