"""Operators that are a whole layer: ONNX ``Attention`` and the fused ones ONNX Runtime's optimizer writes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from espalier.ir.graph import Node
from espalier.passes.lifting import attention
from espalier.passes.lifting.axes import BATCH, FEATURE, KEY, TOKEN, Atom, Axes, axis
from espalier.passes.lifting.lifter import Lifter, Result, rule
from espalier.passes.lifting.probe import LOWEST
from espalier.passes.lifting.rules_math import layer_norm
from espalier.passes.lifting.values import BSF, SF, Constant, Lengths, Scores, Tensor, Value, View, rows
from espalier.passes.symbolic import ONE


def split_heads(view: View, heads: int) -> View | None:
    """``[B, S, H*D]`` as ``[B, H, S, D]``."""
    base = view.base
    if view.axes != base.axes() or base.layout != BSF or heads < 1 or base.features % heads:
        return None
    size = base.features // heads
    axes: Axes = (
        axis(BATCH, base.batch),
        axis(FEATURE, heads, size),
        axis(TOKEN, base.tokens),
        axis(FEATURE, size),
    )
    return replace(view, axes=axes)


def _scores(q: View, k: View, heads: int, scale: float) -> Scores:
    """Scores ``[B, H, S, S]`` of two tensors of all heads."""
    keys = tuple(Atom(KEY, atom.size) for atom in axis(TOKEN, k.base.tokens))
    axes: Axes = (axis(BATCH, q.base.batch), axis(FEATURE, heads), axis(TOKEN, q.base.tokens), keys)
    return Scores(q.base, k.base, heads, axes, q.scale * k.scale * scale)


def _masked(lift: Lifter, scores: Scores, name: str) -> Scores | None:
    """Scores with the mask operand of ONNX Attention: added when float, choosing when bool."""
    if lift.dtype(name) != "bool":
        return attention.add(lift, scores, name)
    found = lift.prober.condition(name, scores.heads)
    if found is not None and found[1]:
        if not found[0]:
            return scores
        return replace(scores, key_mask=found[0], mask_value=LOWEST) if attention.maskable(lift, found[0]) else None
    shape = lift.shape(name)
    if shape is None or lift.opset < 9:
        return None
    zero, low = lift.scalar(0.0), lift.scalar(LOWEST)
    dims = tuple(d.number if d.number is not None else repr(d) for d in shape)
    additive = lift.foreign("Where", [name, zero, low], name + ".additive", "float32", dims)
    return attention.add(lift, scores, additive)


@rule("Attention")
def onnx_attention(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    if (
        attrs.get("is_causal")
        or attrs.get("softcap")
        or any(v is not None for v in inputs[4:])
        or len(node.outputs) > 1
    ):
        return None
    q, k, v = inputs[:3]
    if not isinstance(q, View) or not isinstance(k, View) or not isinstance(v, View):
        return None
    packed = len(q.axes) == 3
    if packed:
        heads = int(attrs.get("q_num_heads", 0))
        if heads != attrs.get("kv_num_heads"):
            return None
        parts = [split_heads(x, heads) for x in (q, k, v)]
    else:
        parts = [q, k, v]
    first, second, third = parts
    if first is None or second is None or third is None or len(first.axes) != 4 or len(second.axes) != 4:
        return None
    turned = replace(second, axes=(*second.axes[:2], second.axes[3], second.axes[2]))
    found = attention.matmul(lift, node.outputs[0], first, turned, 1.0)
    if not isinstance(found, Scores):
        return None
    scale = attrs.get("scale") or 1.0 / math.sqrt(found.q.features // found.heads)
    scores: Scores | None = replace(found, scale=found.scale * float(scale))
    if len(inputs) > 3 and inputs[3] is not None and scores is not None:
        scores = _masked(lift, scores, node.inputs[3])
    if scores is None:
        return None
    result = attention.matmul(lift, node.outputs[0], replace(scores, normal=True), third, 1.0)
    return replace(result, axes=result.base.axes()) if packed and isinstance(result, View) else result


def _key_mask(lift: Lifter, scores: Scores, name: str, value: float) -> Scores | None:
    """The mask operand of a fused attention: raw ``[B, S]``, or the lengths ``[B]`` of right-padded sequences."""
    mask = lift.get(name)
    low = max(value, LOWEST)
    if isinstance(mask, Lengths):
        return replace(scores, key_mask=_prefix(lift, mask.mask), mask_value=low)
    if not isinstance(mask, View) or not mask.base.integer or mask.axes != mask.base.axes():
        return None
    if mask.base.tokens != scores.k.tokens:
        return None
    return replace(scores, key_mask=mask.base.name, mask_value=low)


def _prefix(lift: Lifter, mask: str) -> str:
    """``column < count of ones`` per sequence as int64 ``[B, S]``.

    That is the mask itself for right-padded sequences, and what ONNX Runtime computes for all others.
    """
    key = ("prefix", mask)
    if key not in lift.derived:
        shape = lift.graph.types[mask].shape or ()
        whole = lift.foreign("Cast", [mask], mask + ".int64", "int64", shape, to=7)
        one = lift.constant("one", np.array(1, np.int64))
        valid = lift.foreign("Equal", [whole, one], mask + ".valid", "bool", shape)
        bits = lift.foreign("Cast", [valid], mask + ".bits", "int64", shape, to=7)
        if lift.opset >= 13:
            axes = lift.constant("axes", np.array([1], np.int64))
            count = lift.foreign("ReduceSum", [bits, axes], mask + ".count", "int64", (shape[0], 1))
        else:
            count = lift.foreign("ReduceSum", [bits], mask + ".count", "int64", (shape[0], 1), axes=[1])
        extents = lift.foreign("Shape", [mask], mask + ".shape", "int64", (2,))
        tokens = lift.foreign("Gather", [extents, one], mask + ".tokens", "int64", ())
        zero = lift.constant("zero", np.array(0, np.int64))
        columns = lift.foreign("Range", [zero, tokens, one], mask + ".columns", "int64", (shape[1],))
        inside = lift.foreign("Less", [columns, count], mask + ".inside", "bool", shape)
        lift.derived[key] = lift.foreign("Cast", [inside], mask + ".prefix", "int64", shape, to=7)
    return lift.derived[key]


def fused_attention(
    lift: Lifter, node: Node, parts: list[View], attrs: dict[str, Any], mask: str, bias: str
) -> Value | None:
    """Attention of ``parts`` (q, k and v ``[B, S, H*D]``) with the attributes and masks of ONNX Runtime's operators."""
    q, k, v = parts
    heads = int(attrs.get("num_heads", 0))
    thirds = [split_heads(x, heads) for x in parts]
    if any(x is None for x in thirds) or attrs.get("unidirectional") or len([o for o in node.outputs if o]) > 1:
        return None
    scale = attrs.get("scale") or 1.0 / math.sqrt(q.base.features // heads)
    scores: Scores | None = _scores(q, k, heads, float(scale))
    if mask and scores is not None:
        scores = _key_mask(lift, scores, mask, float(attrs.get("mask_filter_value", -10000.0)))
    if bias and scores is not None:
        scores = attention.add(lift, scores, bias)
    if scores is None:
        return None
    return attention.emit(lift, replace(scores, normal=True), v, node.outputs[0])


@rule("Attention", domain="com.microsoft")
def ms_attention(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    x, weight = rows(inputs[0]), inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    names = [*node.inputs, "", "", "", ""]
    if x is None or x.axes != x.base.axes() or not isinstance(weight, Constant) or names[4] or attrs.get("do_rotary"):
        return None
    sizes = attrs.get("qkv_hidden_sizes") or [weight.array.shape[1] // 3] * 3
    parts = []
    starts = np.cumsum([0, *sizes])
    for k in range(3):
        low, high = int(starts[k]), int(starts[k + 1])
        part = lift.float32(weight, f".{'qkv'[k]}", lambda a, low=low, high=high: a[:, low:high].T)  # type: ignore[misc]
        add = ""
        if isinstance(bias, Constant):
            add = lift.float32(bias, f".{'qkv'[k]}", lambda a, low=low, high=high: a[low:high])  # type: ignore[misc]
        elif bias is not None:
            return None
        solid = lift.solid(x)
        parts.append(lift.emit("Linear", [solid.name, part, add], {}, replace(solid, name="", features=high - low)))
    return fused_attention(lift, node, parts, attrs, names[3], names[5])


@rule("MultiHeadAttention", domain="com.microsoft")
def ms_multi_head(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    names = [*node.inputs, *[""] * 10]
    parts = [rows(v) for v in [*inputs, None, None][:3]]
    q, k, v = parts
    if q is None or k is None or v is None or any(names[6:10]):
        return None
    bias = inputs[3] if len(inputs) > 3 else None
    biased = [q, k, v]
    if bias is not None:
        total = q.base.features + k.base.features + v.base.features
        if not isinstance(bias, Constant) or bias.array.shape != (total,):
            return None
        at = 0
        for n, part in enumerate(biased):
            low, high = at, at + part.base.features
            at = high
            vector = lift.float32(bias, f".{'qkv'[n]}", lambda a, low=low, high=high: a[low:high])  # type: ignore[misc]
            solid = lift.solid(part)
            biased[n] = lift.emit("Add", [solid.name, vector], {}, replace(solid, name=""), axes=part.axes)
    return fused_attention(lift, node, biased, attrs, names[4], names[5])


@rule("EmbedLayerNormalization", domain="com.microsoft")
def embed_layer_norm(lift: Lifter, node: Node, attrs: dict[str, Any], inputs: list[Value | None]) -> Result:
    padded = [*inputs, *[None] * 9]
    ids, segments, words, positions, kinds, gamma, beta = padded[:7]
    if not isinstance(ids, View) or not ids.base.integer or not isinstance(words, Constant):
        return None
    offset = lift.prober.positions(node.inputs[8]) if padded[8] is not None else (0, 2)
    if offset is None or not isinstance(positions, Constant) or ids.axes != ids.base.axes():
        return None
    base, width = ids.base, words.array.shape[1]
    tensor = Tensor("", BSF, base.batch, base.tokens, width)
    total = lift.emit("Embedding", [lift.float32(words), base.name], {}, tensor)
    if segments is not None:
        if not isinstance(segments, View) or not segments.base.integer or not isinstance(kinds, Constant):
            return None
        other = lift.emit("Embedding", [lift.float32(kinds), segments.base.name], {}, tensor)
        total = lift.emit("Add", [total.base.name, other.base.name], {}, tensor)
    columns = lift.emit(
        "Positions", [base.name], {"offset": offset[0]}, Tensor("", "1S", ONE, base.tokens, 1, True), integer=True
    )
    places = lift.emit(
        "Embedding", [lift.float32(positions), columns.base.name], {}, Tensor("", SF, ONE, base.tokens, width)
    )
    total = lift.emit("Add", [total.base.name, places.base.name], {}, tensor, name=[*node.outputs, "", "", ""][2])
    result = layer_norm(lift, total, gamma, beta, float(attrs.get("epsilon", 1e-12)), node.outputs[0])
    mask = padded[7]
    plain = isinstance(mask, View) and mask.base.integer and mask.axes == mask.base.axes()
    lengths = Lengths(mask.base.name) if plain and isinstance(mask, View) else None
    return [result, lengths, total][: len(node.outputs)]
