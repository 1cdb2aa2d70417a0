"""The native dialect: one declarative spec per op, with type inference and a plain NumPy body.

The bodies define what an op means, on padded tensors. The engine and every importer are held to them. They take and
give float32, accumulate in float64 where order of summation would show, and let NaN and infinity through as ONNX does.

Notation: ``B`` batch, ``S`` sequence, ``F`` features, ``H`` heads, ``D`` head size. A token tensor is ``[B, S, F]``, a
sequence tensor ``[B, F]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import GraphError, InputShapeError
from espalier.ir import images, inference
from espalier.ir.graph import TensorType
from espalier.ir.quantization import QUANTIZED, dequantize, quantize, token_parameters

Array = NDArray[Any]

FLOAT = ("float32",)
ANY_FLOAT = ("float16", "float32", "float64")
INTEGER = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


@dataclass(frozen=True)
class InputSpec:
    """One operand. ``constant`` operands must be entries of ``Graph.constants``; an absent optional one is ``""``."""

    name: str
    dtypes: tuple[str, ...] = FLOAT
    constant: bool = False
    optional: bool = False


@dataclass(frozen=True)
class AttrSpec:
    """One attribute, always present. ``float`` also takes an int; ``choices`` limits the values."""

    type: type
    choices: tuple[Any, ...] = ()

    def refusal(self, value: object) -> str:
        """What is wrong with ``value``, or ""."""
        kinds: tuple[type, ...] = (int, float) if self.type is float else (self.type,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.type is not bool):
            return f"expected {self.type.__name__}, got {value!r} ({type(value).__name__})"
        if self.choices and value not in self.choices:
            return f"expected one of {', '.join(map(str, self.choices))}, got {value!r}"
        return ""


@dataclass(frozen=True)
class OpSpec:
    """What one native op takes, what it gives and what it computes.

    ``rule(*types, **attrs)`` and ``body(*arrays, **attrs)`` get None for an absent operand.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    attrs: Mapping[str, AttrSpec]
    rule: Callable[..., TensorType]
    body: Callable[..., Array]

    def infer(self, types: Sequence[TensorType | None], attrs: Mapping[str, Any]) -> TensorType:
        """Type of the output. ``types`` are those of the operands in order, None for an absent one.

        Raises GraphError on a wrong number of operands, an unknown, missing or ill-typed attribute, or operand types
        that the op does not take.
        """
        padded = self._operands(types)
        self._check_attrs(attrs)
        for spec, kind in zip(self.inputs, padded, strict=True):
            if kind is not None and kind.dtype not in spec.dtypes:
                wanted = " or ".join(spec.dtypes)
                raise GraphError(f"{self.name}: operand {spec.name!r} must be of dtype {wanted}, got {kind}")
        return self.rule(*padded, **attrs)

    def apply(self, arrays: Sequence[Array | None], attrs: Mapping[str, Any]) -> Array:
        """Run the NumPy body. ``arrays`` are the operands in order, None for an absent one.

        Raises InputShapeError for a token id outside its table. Floating point warnings are silenced: NaN and
        infinity are values like others here.
        """
        with np.errstate(all="ignore"):
            return self.body(*self._operands(arrays), **attrs)

    def _operands(self, given: Sequence[Any]) -> list[Any]:
        least = sum(not spec.optional for spec in self.inputs)
        if not least <= len(given) <= len(self.inputs):
            counts = str(least) if least == len(self.inputs) else f"{least} to {len(self.inputs)}"
            raise GraphError(f"{self.name} takes {counts} operands, got {len(given)}")
        padded = [*given, *[None] * (len(self.inputs) - len(given))]
        for spec, operand in zip(self.inputs, padded, strict=True):
            if operand is None and not spec.optional:
                raise GraphError(f"{self.name}: operand {spec.name!r} is missing")
        return padded

    def _check_attrs(self, attrs: Mapping[str, Any]) -> None:
        known = ", ".join(self.attrs) or "none"
        for name in attrs:
            if name not in self.attrs:
                raise GraphError(f"{self.name} has no attribute {name!r}; it takes: {known}")
        for name, spec in self.attrs.items():
            if name not in attrs:
                raise GraphError(f"{self.name}: attribute {name!r} is missing; it takes: {known}")
            refusal = spec.refusal(attrs[name])
            if refusal:
                raise GraphError(f"{self.name}: attribute {name!r}: {refusal}")


# ---- bodies ----------------------------------------------------------------------------------------------------------


def _f32(x: Array) -> Array:
    return np.asarray(x, np.float32)


def positions(ids: Array, offset: int) -> Array:
    return np.arange(offset, offset + ids.shape[1], dtype=np.int64)[None]


def positions_from_ids(ids: Array, padding_idx: int) -> Array:
    real = (ids != padding_idx).astype(np.int64)
    columns: Array = np.cumsum(real, axis=1) * real + padding_idx
    return columns


def embedding(table: Array, ids: Array) -> Array:
    wrong = (ids < 0) | (ids >= len(table))
    if wrong.any():
        raise InputShapeError(
            f"id {ids[wrong].flat[0]} is outside a table of {len(table)} rows; expected 0 to {len(table) - 1}. "
            "Check the tokenizer, or the sequence length where the table is one of positions"
        )
    rows: Array = table[ids.astype(np.int64)]
    return rows


def relative_bias(table: Array, ids: Array, num_buckets: int, max_distance: int) -> Array:
    seq = ids.shape[1]
    column = np.arange(seq, dtype=np.int64)
    distance = column[None, :] - column[:, None]  # [query, key]
    buckets = relative_buckets(distance, num_buckets, max_distance)
    return np.ascontiguousarray(table[buckets].transpose(2, 0, 1)[None])


def relative_buckets(distance: Array, num_buckets: int, max_distance: int) -> Array:
    """Bucket of each ``key - query`` distance: T5's bidirectional scheme, which MPNet shares.

    Keys to the right take the upper half of the buckets. Near distances have a bucket each; farther ones share
    buckets of logarithmic width, up to ``max_distance``.
    """
    half = num_buckets // 2
    exact = half // 2
    away = np.abs(distance)
    # The models were trained with float32 logarithms; float64 would put a few distances into the other bucket.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    buckets: Array = np.where(distance > 0, half, 0) + np.where(away < exact, away, far)
    return buckets


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return _f32(y if bias is None else y + bias)


def qlinear(
    x: Array,
    weight: Array,
    weight_scale: Array,
    weight_zero: Array | None,
    bias: Array | None,
    x_scale: Array | None,
    x_zero: Array | None,
    activations: str,
) -> Array:
    if x_scale is None or x_zero is None:
        x_scale, x_zero = token_parameters(x)
    centred = quantize(x, x_scale, x_zero).astype(np.float64) - x_zero
    weights = weight.astype(np.float64)
    if weight_zero is not None:
        weights -= weight_zero.astype(np.float64).reshape(-1, 1)
    # Integers, and exact: they stay far below 2^53.
    total = centred @ weights.T
    y = total * x_scale * weight_scale
    return _f32(y if bias is None else y + bias)


def fake_quantize(x: Array, scale: Array, zero: Array) -> Array:
    return dequantize(quantize(x, scale, zero), scale, zero)


def layer_norm(x: Array, gamma: Array, beta: Array | None, epsilon: float) -> Array:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon) * gamma
    return _f32(y if beta is None else y + beta)


def _erf(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.flat), np.float64, x.size).reshape(x.shape)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "erf": _erf,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "neg": np.negative,
    "reciprocal": lambda x: 1 / x,
    "softplus": lambda x: np.logaddexp(0, x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
}
"""Elementwise functions by the ``kind`` of Activation, on float64. ``elu`` has alpha 1."""


def activation(x: Array, kind: str) -> Array:
    return _f32(ACTIVATIONS[kind](x.astype(np.float64)))


def softmax(x: Array) -> Array:
    wide = x.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True, initial=-np.inf))
    return _f32(powers / powers.sum(axis=-1, keepdims=True))


def attention(
    q: Array,
    k: Array,
    v: Array,
    key_mask: Array | None,
    bias: Array | None,
    heads: int,
    scale: float,
    mask_value: float,
) -> Array:
    batch, seq, _ = q.shape

    def split(x: Array) -> Array:  # [B, S, H*D] -> [B, H, S, D]
        return x.astype(np.float64).reshape(batch, seq, heads, x.shape[-1] // heads).transpose(0, 2, 1, 3)

    # Scores are rounded to float32 before the mask is added: a row masked everywhere with float32's lowest number
    # must come out uniform, as it does in ONNX Runtime, and two such masks must overflow.
    scores = _f32(scale * (split(q) @ split(k).swapaxes(-1, -2)))
    if bias is not None:
        scores = scores + bias
    if key_mask is not None:
        # Not (1 - mask) * mask_value: that is NaN at kept keys when mask_value is -inf.
        scores = scores + np.where(key_mask != 0, np.float32(0), np.float32(mask_value))[:, None, None, :]
    mixed = softmax(scores).astype(np.float64) @ split(v)
    return _f32(mixed.transpose(0, 2, 1, 3).reshape(batch, seq, v.shape[-1]))


def select_token(x: Array, index: int) -> Array:
    if not -x.shape[1] <= index < x.shape[1]:
        raise InputShapeError(f"token {index} is outside a sequence of {x.shape[1]} tokens; expected a longer one")
    return np.ascontiguousarray(x[:, index])


def masked_mean(x: Array, mask: Array | None, epsilon: float) -> Array:
    weights = np.ones((*x.shape[:2], 1)) if mask is None else mask.astype(np.float64)[..., None]
    return _f32((x * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), epsilon))


def l2_normalize(x: Array, epsilon: float) -> Array:
    wide = x.astype(np.float64)
    return _f32(wide / np.maximum(np.sqrt((wide * wide).sum(axis=-1, keepdims=True)), epsilon))


def slice_features(x: Array, start: int, stop: int, squeeze: bool) -> Array:
    part = x[..., start:stop]
    return np.ascontiguousarray(part[..., 0] if squeeze else part)


def cast(x: Array, dtype: str) -> Array:
    return x.astype(dtype)


def _float32_binary(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda x, y: _f32(function(x, y))


def _larger(x: Array, y: Array) -> Array:
    return np.where(y > x, y, x)


def _smaller(x: Array, y: Array) -> Array:
    return np.where(y < x, y, x)


_BINARY: tuple[tuple[str, Callable[[Array, Array], Array]], ...] = (
    ("Add", np.add),
    ("Sub", np.subtract),
    ("Mul", np.multiply),
    ("Div", np.divide),
    ("Max", _larger),
    ("Min", _smaller),
)
_X = InputSpec("x")
_IDS = InputSpec("ids", INTEGER)
_TABLE = InputSpec("table", constant=True)
_EPSILON = {"epsilon": AttrSpec(float)}
_WINDOW = {"window": AttrSpec(list)}
MOST_PARTS = 64
"""Operands of a Concat."""

_SPECS = (
    OpSpec("Positions", (_IDS,), {"offset": AttrSpec(int)}, inference.positions, positions),
    OpSpec(
        "PositionsFromIds", (_IDS,), {"padding_idx": AttrSpec(int)}, inference.positions_from_ids, positions_from_ids
    ),
    OpSpec("Embedding", (_TABLE, _IDS), {}, inference.embedding, embedding),
    OpSpec(
        "RelativeBias",
        (_TABLE, _IDS),
        {"num_buckets": AttrSpec(int), "max_distance": AttrSpec(int)},
        inference.relative_bias,
        relative_bias,
    ),
    OpSpec(
        "Linear",
        (_X, InputSpec("weight", constant=True), InputSpec("bias", constant=True, optional=True)),
        {},
        inference.linear,
        linear,
    ),
    OpSpec(
        "QLinear",
        (
            _X,
            InputSpec("weight", QUANTIZED, constant=True),
            InputSpec("weight_scale", constant=True),
            InputSpec("weight_zero", QUANTIZED, constant=True, optional=True),
            InputSpec("bias", constant=True, optional=True),
            InputSpec("x_scale", constant=True, optional=True),
            InputSpec("x_zero", QUANTIZED, constant=True, optional=True),
        ),
        {"activations": AttrSpec(str, ("static", "token"))},
        inference.qlinear,
        qlinear,
    ),
    OpSpec(
        "FakeQuantize",
        (_X, InputSpec("scale", constant=True), InputSpec("zero", QUANTIZED, constant=True)),
        {},
        inference.fake_quantize,
        fake_quantize,
    ),
    OpSpec(
        "LayerNorm",
        (_X, InputSpec("gamma", constant=True), InputSpec("beta", constant=True, optional=True)),
        _EPSILON,
        inference.layer_norm,
        layer_norm,
    ),
    OpSpec(
        "Activation", (_X,), {"kind": AttrSpec(str, tuple(ACTIVATIONS))}, inference.same_type("Activation"), activation
    ),
    *(
        OpSpec(name, (_X, InputSpec("y")), {}, inference.binary(name), _float32_binary(function))
        for name, function in _BINARY
    ),
    OpSpec(
        "Attention",
        (
            InputSpec("q"),
            InputSpec("k"),
            InputSpec("v"),
            InputSpec("key_mask", INTEGER, optional=True),
            InputSpec("bias", optional=True),
        ),
        {"heads": AttrSpec(int), "scale": AttrSpec(float), "mask_value": AttrSpec(float)},
        inference.attention,
        attention,
    ),
    OpSpec("SelectToken", (_X,), {"index": AttrSpec(int)}, inference.select_token, select_token),
    OpSpec("MaskedMean", (_X, InputSpec("mask", INTEGER, optional=True)), _EPSILON, inference.masked_mean, masked_mean),
    OpSpec("ImageToTokens", (_X,), {}, images.image_to_tokens_type, images.image_to_tokens),
    OpSpec(
        "TokensToImage",
        (_X,),
        {"rows": AttrSpec(int), "columns": AttrSpec(int)},
        images.tokens_to_image_type,
        images.tokens_to_image,
    ),
    OpSpec("Unfold", (_X,), {**_WINDOW, "align": AttrSpec(int)}, images.unfold_type, images.unfold),
    OpSpec("MaxPool", (_X,), _WINDOW, images.pool_type("MaxPool"), images.max_pool),
    OpSpec(
        "MeanPool",
        (_X,),
        {**_WINDOW, "count_edges": AttrSpec(bool)},
        images.pool_type("MeanPool"),
        images.mean_pool,
    ),
    OpSpec(
        "Concat",
        tuple(InputSpec(f"x{i}", optional=i > 0) for i in range(MOST_PARTS)),
        {},
        images.concat_type,
        images.concat,
    ),
    OpSpec("Spread", (_X,), {"tokens": AttrSpec(int)}, images.spread_type, images.spread),
    OpSpec("L2Normalize", (_X,), _EPSILON, inference.same_type("L2Normalize"), l2_normalize),
    OpSpec("Softmax", (_X,), {}, inference.same_type("Softmax"), softmax),
    OpSpec(
        "SliceFeatures",
        (_X,),
        {"start": AttrSpec(int), "stop": AttrSpec(int), "squeeze": AttrSpec(bool)},
        inference.slice_features,
        slice_features,
    ),
    OpSpec("Cast", (InputSpec("x", ANY_FLOAT),), {"dtype": AttrSpec(str, ANY_FLOAT)}, inference.cast, cast),
)

BIAS_OPERAND = {"Linear": 2, "QLinear": 4}
"""Which operand of a linear layer is its bias."""

OPS: dict[str, OpSpec] = {spec.name: spec for spec in _SPECS}
"""Every native op by name."""
