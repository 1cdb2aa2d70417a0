"""The NumPy body of every native op on cases small enough to work out by hand, and its type inference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from espalier.errors import GraphError, InputShapeError
from espalier.ir import ACTIVATIONS, OPS, TensorType
from espalier.ir.images import Window

INF, NAN = float("inf"), float("nan")
LOWEST = float(np.finfo(np.float32).min)


def apply(op: str, *operands: Any, **attrs: Any) -> np.ndarray:
    arrays = [np.asarray(x, np.float32) if isinstance(x, list) else x for x in operands]
    return OPS[op].apply(arrays, attrs)


def infer(op: str, *kinds: TensorType | None, **attrs: Any) -> TensorType:
    return OPS[op].infer(kinds, attrs)


def f32(*shape: int | str) -> TensorType:
    return TensorType("float32", shape)


def i64(*shape: int | str) -> TensorType:
    return TensorType("int64", shape)


def i8(*shape: int | str) -> TensorType:
    return TensorType("int8", shape)


def u8(*shape: int | str) -> TensorType:
    return TensorType("uint8", shape)


def window(*pairs: tuple[int, int], **others: tuple[int, int]) -> list[int]:
    """Of source, result, kernel and what else is not usual."""
    return Window(*pairs, **others).numbers


X = f32("batch", "seq", 8)
IDS = i64("batch", "seq")


def close(found: np.ndarray, wanted: Any) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-6, atol=1e-7)


# ---- bodies ----------------------------------------------------------------------------------------------------------


def test_positions() -> None:
    ids = np.array([[7, 7, 7], [1, 1, 1]])
    np.testing.assert_array_equal(apply("Positions", ids, offset=2), [[2, 3, 4]])


def test_positions_from_ids() -> None:
    ids = np.array([[5, 6, 1, 1], [1, 1, 5, 6], [1, 1, 1, 1]])
    found = apply("PositionsFromIds", ids, padding_idx=1)
    np.testing.assert_array_equal(found, [[2, 3, 1, 1], [1, 1, 2, 3], [1, 1, 1, 1]])
    assert found.dtype == np.int64


def test_embedding() -> None:
    table = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    close(apply("Embedding", table, np.array([[2, 0]], np.int32)), [[[5, 6], [1, 2]]])
    for wrong in (3, -1):
        with pytest.raises(InputShapeError, match=f"id {wrong} is outside a table of 3 rows"):
            apply("Embedding", table, np.array([[0, wrong]]))


def test_relative_bias() -> None:
    table = np.arange(16, dtype=np.float32).reshape(8, 2)
    found = apply("RelativeBias", table, np.zeros((3, 3), np.int64), num_buckets=8, max_distance=5)
    # Buckets 0 to 3 are for keys at or to the left of the query, 4 to 7 to the right; distances 0 and 1 are exact.
    buckets = np.array([[0, 5, 6], [1, 0, 5], [2, 1, 0]])
    assert found.shape == (1, 2, 3, 3)
    close(found[0, 1], table[buckets, 1])


def test_linear() -> None:
    weight, bias = np.array([[1, 0], [2, 3], [0, 0]], np.float32), np.array([0, 1, 2], np.float32)
    close(apply("Linear", [[1, 2]], weight, bias), [[1, 9, 2]])
    close(apply("Linear", [[[1, 2]]], weight, None), [[[1, 8, 0]]])
    # A zero weight does not hide an infinity: 0 * inf is NaN.
    close(apply("Linear", [[INF, 1]], weight, bias), [[INF, INF, NAN]])


def test_linear_accumulates_in_float64() -> None:
    x = np.array([[1e8, 1, -1e8]], np.float32)
    close(apply("Linear", x, np.ones((1, 3), np.float32), None), [[1]])


def test_qlinear_with_static_activations() -> None:
    weight, scale = np.array([[2, -3], [0, 1]], np.int8), np.array([0.5, 2], np.float32)
    x_scale, x_zero = np.float32(0.25), np.uint8(10)
    # In steps of 0.25 from 0 at 10: 1.13 is 15 (4.52 rounds to 5), -9 saturates at 0, that is -10 steps.
    found = apply("QLinear", [[1.13, -9]], weight, scale, None, None, x_scale, x_zero, activations="static")
    close(found, [[(2 * 5 + 3 * 10) * 0.25 * 0.5, -10 * 0.25 * 2]])
    bias, w_zero = np.array([1, -1], np.float32), np.array([2, 1], np.int8)
    found = apply("QLinear", [[1.13, -9]], weight, scale, w_zero, bias, x_scale, x_zero, activations="static")
    close(found, [[(0 * 5 + 5 * 10) * 0.25 * 0.5 + 1, (-1 * 5 - 0 * 10) * 0.25 * 2 - 1]])


def test_qlinear_gives_each_token_its_own_scale() -> None:
    weight, scale = np.array([[131, 129]], np.uint8), np.float32(1)
    x = np.array([[[255, -0.0], [0, 0]], [[127.5, -127.5], [255 * 4, 4 * 2.5]]], np.float32)
    found = apply("QLinear", x, weight, scale, np.uint8(128), None, activations="token")
    # The third token's zero point, 127.5, rounds to 128, so 127.5 saturates at 127 steps. 2.5 steps round to 2.
    close(found, [[[3 * 255], [0]], [[3 * 127 - 128], [(3 * 255 + 2) * 4]]])


def test_qlinear_gives_nan_for_a_token_that_is_not_finite() -> None:
    weight, scale = np.array([[1, 0]], np.int8), np.float32(1)
    x = [[1, NAN], [INF, 1], [3e38, -3e38], [255, 0]]
    close(apply("QLinear", x, weight, scale, None, None, activations="token"), [[NAN], [NAN], [NAN], [255]])


def test_qlinear_sums_integers_exactly() -> None:
    columns = 5001
    x = np.full((1, columns), 255, np.float32)
    weight = np.full((1, columns), 127, np.int8)
    weight[0, ::2] = -127
    found = apply("QLinear", x, weight, np.float32(1), None, None, np.float32(1), np.uint8(0), activations="static")
    close(found, [[-127 * 255]])


def test_fake_quantize() -> None:
    x, scale = [[0.26, -0.25, 0.75, -0.75, 100, -100, INF, NAN]], np.float32(0.5)
    # Ties go to the even step; NaN to the lowest.
    close(apply("FakeQuantize", x, scale, np.int8(-2)), [[0.5, 0, 1, -1, 64.5, -63, 64.5, -63]])
    close(apply("FakeQuantize", x, scale, np.uint8(0)), [[0.5, 0, 1, 0, 100, 0, 127.5, 0]])


def test_layer_norm() -> None:
    gamma, beta = np.array([2, 2], np.float32), np.array([1, 0], np.float32)
    close(apply("LayerNorm", [[1, 3]], gamma, beta, epsilon=0.0), [[-1, 2]])
    close(apply("LayerNorm", [[1, 3]], gamma, None, epsilon=3.0), [[-1, 1]])
    close(apply("LayerNorm", [[5, 5]], gamma, None, epsilon=1e-12), [[0, 0]])
    close(apply("LayerNorm", [[INF, 1], [NAN, 1]], gamma, None, epsilon=0.0), np.full((2, 2), NAN))


ACTIVATION_CASES: dict[str, list[tuple[float, float]]] = {
    "gelu": [(0, 0), (1, 0.8413447460685429), (-INF, NAN), (INF, INF)],
    "gelu_tanh": [(0, 0), (1, 0.8411919906082768), (INF, INF)],
    "relu": [(-2, 0), (3, 3), (INF, INF), (-INF, 0)],
    "tanh": [(0.5, math.tanh(0.5)), (INF, 1), (-INF, -1)],
    "sigmoid": [(0, 0.5), (INF, 1), (-INF, 0), (-1000, 0)],
    "silu": [(0, 0), (2, 2 / (1 + math.exp(-2))), (INF, INF)],
    "quick_gelu": [(1, 1 / (1 + math.exp(-1.702)))],
    "erf": [(1, 0.8427007929497149), (-1, -0.8427007929497149), (INF, 1)],
    "exp": [(0, 1), (1, math.e), (1000, INF), (-INF, 0)],
    "sqrt": [(4, 2), (-1, NAN), (INF, INF)],
    "abs": [(-3, 3), (-INF, INF)],
    "neg": [(3, -3)],
    "reciprocal": [(4, 0.25), (0, INF), (INF, 0)],
    "softplus": [(0, math.log(2)), (1000, 1000), (-1000, 0), (INF, INF)],
    "elu": [(2, 2), (-1, math.expm1(-1)), (1000, 1000), (-INF, -1)],
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    for x, y in [*ACTIVATION_CASES[kind], (NAN, NAN)]:
        close(apply("Activation", [[x]], kind=kind), [[y]])


def test_arithmetic_broadcasts() -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    close(apply("Add", x, x[:1]), x + x[:1])
    close(apply("Sub", x, np.array([1, 2], np.float32)), [[[-1, -1], [1, 1]], [[3, 3], [5, 5]]])
    close(apply("Mul", x, np.array(3, np.float32)), 3 * x)
    close(apply("Div", np.array(1, np.float32), np.array([[0, 2], [INF, NAN]], np.float32)), [[INF, 0.5], [0, NAN]])


def test_max_and_min() -> None:
    x, y = [[NAN, 1, INF, -INF]], np.array([[1, NAN, 2, 3]], np.float32)
    close(apply("Max", x, y), [[NAN, 1, INF, 3]])
    close(apply("Min", x, y), [[NAN, 1, 2, -INF]])
    close(apply("Max", [[[1, 5], [3, 2]]], np.array([2, 3], np.float32)), [[[2, 5], [3, 3]]])
    close(apply("Min", [[1, 5]], np.array(2, np.float32)), [[1, 2]])


def attention(q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, **attrs: Any) -> np.ndarray:
    defaults = {"heads": 1, "scale": 1.0, "mask_value": LOWEST}
    return apply("Attention", q, k, v, mask, bias, **{**defaults, **attrs})


def test_attention_weighs_values_by_softmax_of_scores() -> None:
    q, k, v = [[[1], [0]]], [[[0], [math.log(3)]]], [[[4], [8]]]
    close(attention(q, k, v), [[[7], [6]]])
    close(attention(q, k, v, scale=0.0), [[[6], [6]]])


def test_attention_heads_are_slices_of_the_features() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)
    v = rng.standard_normal((2, 3, 6)).astype(np.float32)
    both = attention(q, k, v, heads=2)
    close(both[..., :3], attention(q[..., :2], k[..., :2], v[..., :3]))
    close(both[..., 3:], attention(q[..., 2:], k[..., 2:], v[..., 3:]))


def test_attention_masks_keys() -> None:
    zero, v = np.zeros((1, 3, 1), np.float32), [[[1], [2], [30]]]
    mask = np.array([[1, 1, 0]])
    close(attention(zero, zero, v, mask), [[[1.5]] * 3])
    close(attention(zero, zero, v, mask.astype(bool), mask_value=-INF), [[[1.5]] * 3])
    # A finite mask value only weakens a key.
    close(attention(zero, zero, v, mask, mask_value=-math.log(2)), [[[(1 + 2 + 15) / 2.5]] * 3])


def test_attention_over_padding_alone_is_uniform() -> None:
    """The lowest float swallows the scores, so every key weighs the same; so it does in ONNX Runtime."""
    q, v = [[[3], [1], [2]]], [[[1], [2], [30]]]
    nothing = np.zeros((1, 3), np.int64)
    close(attention(q, q, v, nothing), [[[11]] * 3])
    close(attention(q, q, v, nothing, mask_value=-INF), [[[NAN]] * 3])


def test_attention_bias_broadcasts_over_batch_heads_and_queries() -> None:
    zero, v = np.zeros((2, 2, 2), np.float32), np.array([[[0, 0], [1, 1]]] * 2, np.float32)
    bias = np.array([0, math.log(3)], np.float32)
    close(attention(zero, zero, v, bias=bias.reshape(1, 1, 1, 2), heads=2), np.full((2, 2, 2), 0.75))
    per_head = np.stack([bias, -bias]).reshape(1, 2, 1, 2)
    close(attention(zero, zero, v, bias=per_head, heads=2), np.tile(np.float32([0.75, 0.25]), (2, 2, 1)))
    per_sequence = np.stack([bias, -bias]).reshape(2, 1, 1, 2)
    close(attention(zero, zero, v, bias=per_sequence)[:, 0, 0], [0.75, 0.25])
    per_query = np.stack([bias, -bias]).reshape(1, 1, 2, 2)
    close(attention(zero, zero, v, bias=per_query)[0, :, 0], [0.75, 0.25])


def test_attention_lets_nan_through() -> None:
    zero, v = np.zeros((1, 2, 1), np.float32), [[[1], [NAN]]]
    close(attention(zero, zero, v), [[[NAN]] * 2])
    # Also from a masked key: its weight is zero, and zero times NaN is NaN.
    close(attention(zero, zero, v, np.array([[1, 0]])), [[[NAN]] * 2])


def test_select_token() -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    close(apply("SelectToken", x, index=0), [[0, 1]])
    close(apply("SelectToken", x, index=-1), [[4, 5]])
    with pytest.raises(InputShapeError, match="token 3 is outside a sequence of 3"):
        apply("SelectToken", x, index=3)


def test_masked_mean() -> None:
    x, mask = np.array([[[1, 2], [3, 4]]] * 3, np.float32), np.array([[1, 1], [1, 0], [0, 0]])
    close(apply("MaskedMean", x, mask, epsilon=1e-9), [[2, 3], [1, 2], [0, 0]])
    close(apply("MaskedMean", x, mask.astype(bool), epsilon=1.0), [[2, 3], [1, 2], [0, 0]])
    x[:, 1] = NAN
    close(apply("MaskedMean", x, mask, epsilon=1e-9), np.full((3, 2), NAN))


def test_mean_without_a_mask() -> None:
    x = [[[1, 2], [3, 4]], [[NAN, INF], [1, 1]]]
    close(apply("MaskedMean", x, epsilon=1e-9), [[2, 3], [NAN, INF]])
    close(apply("MaskedMean", x, None, epsilon=4), [[1, 1.5], [NAN, INF]])
    close(apply("MaskedMean", [[[1e8], [1], [-1e8]]], epsilon=1e-9), [[1 / 3]])


def test_images_are_tokens_row_by_row() -> None:
    image = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    tokens = apply("ImageToTokens", image)
    close(tokens, [[[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]])
    close(apply("TokensToImage", tokens, rows=2, columns=3), image)
    close(apply("TokensToImage", tokens, rows=1, columns=6)[0, 1, 0], [6, 7, 8, 9, 10, 11])


NINE = np.arange(1, 10, dtype=np.float32).reshape(1, 9, 1)
"""An image of 3 rows: 1 2 3, 4 5 6, 7 8 9."""


def test_unfold_shows_taps_row_by_row() -> None:
    found = apply("Unfold", NINE, window=window((3, 3), (2, 2), (2, 2)), align=1)
    close(found, [[[1, 2, 4, 5], [2, 3, 5, 6], [4, 5, 7, 8], [5, 6, 8, 9]]])
    both = apply("Unfold", np.concatenate([NINE, -NINE]), window=window((3, 3), (2, 2), (2, 2)), align=1)
    close(both, np.concatenate([found, -found]))


def test_unfold_with_stride_dilation_and_edges() -> None:
    # The outputs read rows -1 and 0, then 1 and 2; columns 0 and 2, then 1 and 3.
    shape = window((3, 3), (2, 2), (2, 2), stride=(2, 1), dilation=(1, 2), before=(1, 0))
    close(apply("Unfold", NINE, window=shape, align=1), [[[0, 0, 1, 3], [0, 0, 2, 0], [4, 6, 7, 9], [5, 0, 8, 0]]])
    beyond = window((1, 1), (1, 3), (1, 1), before=(0, 1))
    close(apply("Unfold", [[[5]]], window=beyond, align=1), [[[0], [5], [0]]])


def test_unfold_rounds_the_features_of_each_tap_up() -> None:
    x, shape = [[[1, NAN], [3, INF]]], window((1, 2), (1, 1), (1, 2))
    close(apply("Unfold", x, window=shape, align=1), [[[1, NAN, 3, INF]]])
    close(apply("Unfold", x, window=shape, align=2), [[[1, NAN, 3, INF]]])
    close(apply("Unfold", x, window=shape, align=3), [[[1, NAN, 0, 3, INF, 0]]])
    close(apply("Unfold", x, window=shape, align=4), [[[1, NAN, 0, 0, 3, INF, 0, 0]]])


def test_max_pool() -> None:
    # Rows, and columns, -1 and 0, then 1 and 2.
    close(apply("MaxPool", NINE, window=window((3, 3), (2, 2), (2, 2), stride=(2, 2), before=(1, 1))),
          [[[1], [3], [7], [9]]])  # fmt: skip
    x = [[[5, -5], [1, -1], [2, -2], [9, -9], [3, -3]]]
    close(apply("MaxPool", x, window=window((1, 5), (1, 1), (1, 3), dilation=(1, 2))), [[[5, -2]]])


def test_max_pool_does_not_count_edges() -> None:
    shape = window((1, 2), (1, 4), (1, 2), before=(0, 1))
    close(apply("MaxPool", [[[-3], [-5]]], window=shape), [[[-3], [-3], [-5], [-INF]]])


def test_nan_is_never_the_largest() -> None:
    x, shape = [[[NAN], [1], [NAN], [NAN], [-INF]]], window((1, 5), (1, 4), (1, 2))
    close(apply("MaxPool", x, window=shape), [[[1], [1], [-INF], [-INF]]])


def test_mean_pool() -> None:
    shape = window((3, 3), (2, 2), (2, 2), stride=(2, 2), before=(1, 1))
    close(apply("MeanPool", NINE, window=shape, count_edges=False), [[[1], [2.5], [5.5], [7]]])
    close(apply("MeanPool", NINE, window=shape, count_edges=True), [[[0.25], [1.25], [2.75], [7]]])
    dilated = window((1, 5), (1, 1), (1, 3), dilation=(1, 2))
    close(apply("MeanPool", [[[5], [NAN], [2], [NAN], [3]]], window=dilated, count_edges=False), [[[10 / 3]]])


def test_mean_pool_beyond_the_edges() -> None:
    shape = window((1, 2), (1, 4), (1, 2), before=(0, 1))
    close(apply("MeanPool", [[[2], [4]]], window=shape, count_edges=False), [[[2], [3], [4], [0]]])
    close(apply("MeanPool", [[[2], [INF]]], window=shape, count_edges=True), [[[1], [INF], [INF], [0]]])


def test_mean_pool_accumulates_in_float64() -> None:
    shape = window((1, 3), (1, 1), (1, 3))
    close(apply("MeanPool", [[[1e8], [1], [-1e8]]], window=shape, count_edges=False), [[[1 / 3]]])


def test_concat() -> None:
    close(apply("Concat", [[1, 2]], None, [[3]], [[NAN, 5, 6]]), [[1, 2, 3, NAN, 5, 6]])
    close(apply("Concat", [[[1], [2]]], [[[3, 4], [5, 6]]]), [[[1, 3, 4], [2, 5, 6]]])
    close(apply("Concat", [[1, 2]]), [[1, 2]])


def test_spread() -> None:
    close(apply("Spread", [[1, 2], [3, NAN]], tokens=2), [[[1, 2], [1, 2]], [[3, NAN], [3, NAN]]])


def test_l2_normalize() -> None:
    close(apply("L2Normalize", [[3, 4], [0, 0]], epsilon=1e-12), [[0.6, 0.8], [0, 0]])
    close(apply("L2Normalize", [[3, 4]], epsilon=10.0), [[0.3, 0.4]])
    close(apply("L2Normalize", [[1e30, 0], [INF, 1], [NAN, 1]], epsilon=1e-12), [[1, 0], [NAN, 0], [NAN, NAN]])


def test_softmax() -> None:
    rows = [[0, math.log(3)], [1000, -1000], [-INF, 0], [-INF, -INF], [NAN, 0], [INF, 0]]
    close(apply("Softmax", rows), [[0.25, 0.75], [1, 0], [0, 1], [NAN, NAN], [NAN, NAN], [NAN, NAN]])


def test_slice_features() -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    close(apply("SliceFeatures", x, start=1, stop=3, squeeze=False), [[[1, 2], [4, 5]]])
    close(apply("SliceFeatures", x, start=1, stop=2, squeeze=True), [[1, 4]])


def test_cast() -> None:
    found = apply("Cast", [[1.0009765625, 1e6]], dtype="float16")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.array([[1.0009765625, INF]], np.float16))


# ---- inference -------------------------------------------------------------------------------------------------------

UNKNOWN = TensorType("float32", None)
IMAGE = f32("batch", 6, 8)
WINDOW: dict[str, Any] = {"window": window((2, 3), (1, 2), (2, 2))}
LINE: dict[str, Any] = {"window": window((1, 3), (1, 4), (1, 2), before=(0, 1))}

INFERRED: list[tuple[str, tuple[TensorType | None, ...], dict[str, Any], TensorType]] = [
    ("Positions", (IDS,), {"offset": 0}, i64(1, "seq")),
    ("PositionsFromIds", (IDS,), {"padding_idx": 1}, IDS),
    ("Embedding", (f32(9, 8), IDS), {}, X),
    ("Embedding", (f32(9, 8), i64(1, "seq")), {}, f32(1, "seq", 8)),
    ("RelativeBias", (f32(32, 4), IDS), {"num_buckets": 32, "max_distance": 128}, f32(1, 4, "seq", "seq")),
    ("Linear", (X, f32(3, 8), f32(3)), {}, f32("batch", "seq", 3)),
    ("Linear", (f32("batch", 8), f32(3, 8), None), {}, f32("batch", 3)),
    ("Linear", (f32("batch", 8), f32(3, 8)), {}, f32("batch", 3)),
    ("QLinear", (X, i8(3, 8), f32(3), i8(), f32(3), f32(), u8()), {"activations": "static"}, f32("batch", "seq", 3)),
    ("QLinear", (f32("batch", 8), u8(3, 8), f32(), u8(3)), {"activations": "token"}, f32("batch", 3)),
    ("FakeQuantize", (X, f32(), i8()), {}, X),
    ("LayerNorm", (X, f32(8), f32(8)), {"epsilon": 0}, X),
    ("Activation", (X,), {"kind": "gelu"}, X),
    ("Add", (f32(1, "seq", 8), X), {}, X),
    ("Add", (X, f32(8)), {}, X),
    ("Add", (f32(), X), {}, X),
    ("Add", (f32("?1", "?2", 8), X), {}, X),
    ("Mul", (f32("batch", 8), f32("batch", "?")), {}, f32("batch", 8)),
    ("Max", (X, f32(8)), {}, X),
    ("Min", (f32("batch", "?"), f32("batch", 8)), {}, f32("batch", 8)),
    ("Softmax", (f32("batch", 3),), {}, f32("batch", 3)),
    ("SelectToken", (X,), {"index": 0}, f32("batch", 8)),
    ("MaskedMean", (X, IDS), {"epsilon": 1e-9}, f32("batch", 8)),
    ("MaskedMean", (X,), {"epsilon": 1e-9}, f32("batch", 8)),
    ("MaskedMean", (X, None), {"epsilon": 1e-9}, f32("batch", 8)),
    ("ImageToTokens", (f32("batch", "?", 2, 3),), {}, f32("batch", 6, "?")),
    ("TokensToImage", (IMAGE,), {"rows": 2, "columns": 3}, f32("batch", 8, 2, 3)),
    ("TokensToImage", (X,), {"rows": 3, "columns": 1}, f32("batch", 8, 3, 1)),
    ("TokensToImage", (UNKNOWN,), {"rows": 1, "columns": 3}, f32("?", "?", 1, 3)),
    ("Unfold", (IMAGE,), {**WINDOW, "align": 1}, f32("batch", 2, 32)),
    ("Unfold", (f32("batch", 6, 5),), {**WINDOW, "align": 3}, f32("batch", 2, 24)),
    ("Unfold", (X,), {**LINE, "align": 1}, f32("batch", 4, 16)),
    ("Unfold", (f32("batch", "seq", "?"),), {**LINE, "align": 4}, f32("batch", 4, "?")),
    ("MaxPool", (IMAGE,), WINDOW, f32("batch", 2, 8)),
    ("MaxPool", (UNKNOWN,), LINE, f32("?", 4, "?")),
    ("MeanPool", (IMAGE,), {**WINDOW, "count_edges": False}, f32("batch", 2, 8)),
    ("MeanPool", (X,), {**LINE, "count_edges": True}, f32("batch", 4, 8)),
    ("Concat", (X,), {}, X),
    ("Concat", (f32("batch", 8), None, f32("batch", 1)), {}, f32("batch", 9)),
    ("Concat", (f32("batch", "?2", 2), f32(2, "seq", 5), f32("?1", 3, 1)), {}, f32(2, 3, 8)),
    ("Concat", (X, f32("batch", "seq", "?")), {}, f32("batch", "seq", "?")),
    ("Concat", (X, UNKNOWN), {}, UNKNOWN),
    ("Spread", (f32("batch", 8),), {"tokens": 5}, f32("batch", 5, 8)),
    ("L2Normalize", (f32("batch", 8),), {"epsilon": 1e-12}, f32("batch", 8)),
    ("SliceFeatures", (X,), {"start": 2, "stop": 4, "squeeze": False}, f32("batch", "seq", 2)),
    ("SliceFeatures", (X,), {"start": 2, "stop": 3, "squeeze": True}, f32("batch", "seq")),
    ("Cast", (X,), {"dtype": "float16"}, TensorType("float16", ("batch", "seq", 8))),
    ("Linear", (UNKNOWN, f32(3, 8), None), {}, UNKNOWN),
    ("Attention", (X, X, f32("batch", "seq", 4), IDS, f32(1, 2, "seq", "seq")),
     {"heads": 2, "scale": 0.5, "mask_value": -INF}, f32("batch", "seq", 4)),
    ("Attention", (X, X, X, None, f32("batch", 1, 1, "seq")),
     {"heads": 2, "scale": 0.5, "mask_value": 0.0}, X),
]  # fmt: skip


@pytest.mark.parametrize(("op", "kinds", "attrs", "wanted"), INFERRED)
def test_inference(op: str, kinds: Any, attrs: Any, wanted: TensorType) -> None:
    assert infer(op, *kinds, **attrs) == wanted


def test_every_op_is_inferred_somewhere_here() -> None:
    assert {op for op, *_ in INFERRED} | {"Sub", "Div"} == set(OPS)


ATTENTION: dict[str, Any] = {"heads": 2, "scale": 0.5, "mask_value": 0.0}

TOKEN: dict[str, Any] = {"activations": "token"}

REFUSED: list[tuple[str, tuple[TensorType | None, ...], dict[str, Any], str]] = [
    ("Linear", (X,), {}, "takes 2 to 3 operands, got 1"),
    ("Softmax", (X, X), {}, "takes 1 operands, got 2"),
    ("Linear", (X, None, f32(3)), {}, "operand 'weight' is missing"),
    ("Linear", (X, f32(3, 7)), {}, "features of x and the columns of weight must agree, got 8 and 7"),
    ("Linear", (X, f32(3, 8), f32(4)), {}, "extent of bias and the rows of weight must agree, got 4 and 3"),
    ("Linear", (X, f32(3, 8, 1)), {}, "'weight' must have 2 dimensions"),
    ("Linear", (f32(8), f32(3, 8)), {}, r"x must be \[batch, seq, features\]"),
    ("Linear", (i64("batch", 8), f32(3, 8)), {}, "operand 'x' must be of dtype float32, got int64"),
    ("QLinear", (X, i8(3, 7), f32()), TOKEN, "features of x and the columns of weight must agree, got 8 and 7"),
    ("QLinear", (X, i8(3, 8), f32(8)), TOKEN, "weight_scale and the rows of weight must agree, got 8 and 3"),
    ("QLinear", (X, i8(3, 8), f32(), u8()), TOKEN, r"one dtype, got int8\[3, 8\] and uint8\[\]"),
    ("QLinear", (X, i8(3, 8), f32(), i8(3, 1)), TOKEN, "'weight_zero' must have 1 dimensions"),
    ("QLinear", (X, f32(3, 8), f32()), TOKEN, "'weight' must be of dtype int8 or uint8"),
    ("QLinear", (X, i8(3, 8), f32(), None, None, f32(), u8()), TOKEN, "no x_scale and x_zero"),
    ("QLinear", (X, i8(3, 8), f32()), {"activations": "static"}, "needs both x_scale and x_zero"),
    ("QLinear", (X, i8(3, 8), f32()), {"activations": "dynamic"}, "expected one of static, token"),
    ("QLinear", (X, i8(3, 8), f32(), None, f32(4)), TOKEN, "bias and the rows of weight must agree, got 4 and 3"),
    ("FakeQuantize", (X, f32(8), i8()), {}, "'scale' must have 0 dimensions"),
    ("FakeQuantize", (X, f32(), i64()), {}, "'zero' must be of dtype int8 or uint8"),
    ("Embedding", (f32(9, 8), f32("batch", "seq")), {}, "operand 'ids' must be of dtype int64"),
    ("Embedding", (f32(9, 8), i64("batch")), {}, "'ids' must have 2 dimensions"),
    ("LayerNorm", (X, f32(7)), {"epsilon": 1e-5}, "features of x and the extent of gamma must agree, got 8 and 7"),
    ("LayerNorm", (X, f32(8)), {}, "attribute 'epsilon' is missing"),
    ("LayerNorm", (X, f32(8)), {"epsilon": "1"}, "attribute 'epsilon': expected float, got '1'"),
    ("LayerNorm", (X, f32(8)), {"epsilon": True}, "expected float, got True"),
    ("Softmax", (X,), {"axis": 1}, "has no attribute 'axis'; it takes: none"),
    ("Activation", (X,), {"kind": "gleu"}, "expected one of gelu, .*got 'gleu'"),
    ("Positions", (IDS,), {"offset": 1.0}, "expected int, got 1.0"),
    ("Add", (X, f32("batch", "seq", 7)), {}, "features must agree, got 8 and 7"),
    ("Add", (f32("batch", 5, 8), f32("batch", 1, 8)), {}, "seq must agree, got 5 and 1"),
    ("Add", (f32(3, 5, 8), f32(2, 5, 8)), {}, "batch must agree, got 3 and 2"),
    ("Add", (X, f32("batch", 8)), {}, "expected tensors of one shape"),
    ("Add", (X, f32(7)), {}, "features must agree, got 8 and 7"),
    ("Add", (f32(8), f32(8)), {}, r"x must be \[batch, seq, features\]"),
    ("SelectToken", (f32("batch", 8),), {"index": 0}, "'x' must have 3 dimensions"),
    ("SelectToken", (f32("batch", 4, 8),), {"index": 4}, "index 4 is outside a sequence of 4 tokens"),
    ("MaskedMean", (f32("batch", 4, 8), i64("batch", 5)), {"epsilon": 1}, "seq of x and mask must agree, got 4 and 5"),
    ("MaskedMean", (), {"epsilon": 1}, "takes 1 to 2 operands, got 0"),
    ("MaskedMean", (X, f32("batch", "seq")), {"epsilon": 1}, "operand 'mask' must be of dtype int64"),
    ("MaskedMean", (f32("batch", 8),), {"epsilon": 1}, "'x' must have 3 dimensions"),
    ("Max", (X, f32("batch", "seq", 7)), {}, "features must agree, got 8 and 7"),
    ("Min", (X, f32("batch", 8)), {}, "expected tensors of one shape"),
    ("ImageToTokens", (X,), {}, r"x must be \[batch, features, rows, columns\] with known extents"),
    ("ImageToTokens", (f32("batch", 8, "rows", 3),), {}, r"known extents, got float32\[batch, 8, rows, 3\]"),
    ("ImageToTokens", (UNKNOWN,), {}, "known extents"),
    ("TokensToImage", (f32("batch", 5, 8),), {"rows": 2, "columns": 3}, r"must be \[batch, 6, features\], got .*5"),
    ("TokensToImage", (f32("batch", 8),), {"rows": 2, "columns": 3}, r"must be \[batch, 6, features\]"),
    ("TokensToImage", (f32(),), {"rows": 2, "columns": 3}, r"must be \[batch, 6, features\]"),
    ("TokensToImage", (IMAGE,), {"rows": -2, "columns": -3}, "must be positive, got -2 and -3"),
    ("TokensToImage", (IMAGE,), {"rows": 2}, "attribute 'columns' is missing"),
    ("Unfold", (f32("batch", 5, 8),), {**WINDOW, "align": 1}, r"\[batch, 6, features\] for a window over \(2, 3\)"),
    ("Unfold", (f32("batch", 8),), {**WINDOW, "align": 1}, r"x must be \[batch, 6, features\]"),
    ("Unfold", (IMAGE,), {**WINDOW, "align": 0}, "align must be positive, got 0"),
    ("Unfold", (IMAGE,), WINDOW, "attribute 'align' is missing"),
    ("MaxPool", (f32("batch", 7, 8),), WINDOW, r"x must be \[batch, 6, features\] .*got float32\[batch, 7, 8\]"),
    ("MaxPool", (f32("batch", 8, 2, 3),), WINDOW, r"x must be \[batch, 6, features\]"),
    ("MaxPool", (IMAGE,), {"window": (2, 3)}, r"attribute 'window': expected list, got \(2, 3\)"),
    ("MaxPool", (IMAGE,), {**WINDOW, "count_edges": True}, "has no attribute 'count_edges'; it takes: window"),
    ("MeanPool", (f32("batch", 7, 8),), {**WINDOW, "count_edges": True}, r"x must be \[batch, 6, features\]"),
    ("MeanPool", (IMAGE,), {**WINDOW, "count_edges": 1}, "expected bool, got 1"),
    ("Concat", (X, f32("batch", 8)), {}, "must differ in their features alone"),
    ("Concat", (f32("?", 8), f32(2, 8), f32(3, 8)), {}, "must differ in their features alone"),
    ("Concat", (f32(2, 3, 8), f32(2, 4, 8)), {}, r"must differ in their features alone, got .*\(2, 4, 8\)"),
    ("Concat", (f32(8), f32(8)), {}, r"must be \[batch, seq, features\] or \[batch, features\]"),
    ("Concat", (None, X), {}, "operand 'x0' is missing"),
    ("Concat", (X, i64("batch", "seq", 1)), {}, "operand 'x1' must be of dtype float32"),
    ("Concat", (X,) * 65, {}, "takes 1 to 64 operands, got 65"),
    ("Spread", (X,), {"tokens": 2}, r"x must be \[batch, features\]"),
    ("Spread", (f32(),), {"tokens": 2}, r"x must be \[batch, features\]"),
    ("Spread", (f32("batch", 8),), {"tokens": 0}, "tokens positive, got .* and 0"),
    ("SliceFeatures", (X,), {"start": 4, "stop": 9, "squeeze": False}, "stop=9 is beyond the 8 features"),
    ("SliceFeatures", (X,), {"start": 4, "stop": 4, "squeeze": False}, "0 <= start < stop"),
    ("SliceFeatures", (X,), {"start": 4, "stop": 6, "squeeze": True}, "squeeze needs one feature, got 2"),
    ("Cast", (IDS,), {"dtype": "float16"}, "operand 'x' must be of dtype float16 or"),
    ("Cast", (X,), {"dtype": "int8"}, "expected one of float16"),
    ("RelativeBias", (f32(16, 4), IDS), {"num_buckets": 32, "max_distance": 128}, "must agree, got 32 and 16"),
    ("RelativeBias", (f32(2, 4), IDS), {"num_buckets": 2, "max_distance": 128}, "num_buckets >= 4"),
    ("Attention", (X, X, X), {**ATTENTION, "heads": 0}, "heads >= 1"),
    ("Attention", (X, X, X), {**ATTENTION, "heads": 3}, "3 heads do not divide the 8 features of q"),
    ("Attention", (X, f32("batch", "seq", 6), X), ATTENTION, "features of q and k must agree, got 8 and 6"),
    ("Attention", (f32(2, 3, 8), f32(2, 4, 8), X), ATTENTION, "seq of q and k must agree, got 3 and 4"),
    ("Attention", (f32(2, 3, 8), X, X, i64(2, 4)), ATTENTION, "seq of k and key_mask must agree, got 3 and 4"),
    ("Attention", (X, X, X, f32("batch", "seq")), ATTENTION, "'key_mask' must be of dtype int64"),
    ("Attention", (X, X, X, None, f32(1, 3, 1, "seq")), ATTENTION, "heads of bias and of q"),
    ("Attention", (X, X, X, None, f32("seq", "seq")), ATTENTION, "'bias' must have 4 dimensions"),
]


@pytest.mark.parametrize(("op", "kinds", "attrs", "message"), REFUSED)
def test_inference_refuses(op: str, kinds: Any, attrs: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        infer(op, *kinds, **attrs)
    assert op in str(caught.value)


def test_inference_without_a_shape() -> None:
    assert infer("Spread", UNKNOWN, tokens=2) == f32("?", 2, "?")
    assert infer("Unfold", UNKNOWN, align=2, **WINDOW) == f32("?", 2, "?")


def test_a_window_is_12_numbers() -> None:
    shape = Window((2, 3), (1, 2), (2, 2), (1, 2), (3, 1), (0, 1))
    assert shape.numbers == [2, 3, 1, 2, 2, 2, 1, 2, 3, 1, 0, 1]
    assert Window.of(shape.numbers) == shape
    right = WINDOW["window"]
    changes = ((0, 0), (5, 0), (6, 0), (9, -1), (10, -1), (4, 2.0), (4, True), (11, "1"))
    changed = [[*right[:at], value, *right[at + 1 :]] for at, value in changes]
    for wrong in ([], right[:-1], [*right, 0], *changed):
        with pytest.raises(GraphError, match=r"a window is 12 whole numbers, .*; got \["):
            infer("MaxPool", IMAGE, window=wrong)


def test_bodies_have_the_inferred_types() -> None:
    """Inference and body agree on concrete shapes, for every op."""
    extents = {"batch": 2, "seq": 3, "?": 8, "?1": 2, "?2": 3}
    for op, kinds, attrs, _ in INFERRED:
        concrete = [
            kind
            and TensorType(
                kind.dtype, (2, 3, 8) if kind.shape is None else tuple(extents.get(str(d), d) for d in kind.shape)
            )
            for kind in kinds
        ]
        arrays = [kind and np.ones(kind.shape, kind.dtype) for kind in concrete]
        wanted = infer(op, *concrete, **attrs)
        found = OPS[op].apply(arrays, attrs)
        assert (found.dtype.name, found.shape) == (wanted.dtype, wanted.shape), op
