"""Scaled dot-product attention, from two matrix products and whatever was done to the scores between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.ops import OPS
from espalier.passes.lifting.axes import BATCH, FEATURE, KEY, TOKEN, Atom, Axes, Axis, axis
from espalier.passes.lifting.embedding import token_source
from espalier.passes.lifting.lifter import Lifter
from espalier.passes.lifting.probe import LOWEST, RelativeBias
from espalier.passes.lifting.values import BSF, Constant, Scores, Tensor, Unrounded, Value, View
from espalier.passes.symbolic import ONE, Expr

HIDDEN = -1000.0
"""A score this low has the weight 0 after Softmax in float32, whether it was added or put in the score's place."""

UNROUNDED = "masks, scores and probabilities are not rounded to 8 bits as in the model: the engine has them in float32"


def matmul(lift: Lifter, name: str, left: Value | None, right: Value | None, alpha: float) -> Value | None:
    """Of two views: scores; of probabilities and a view: attention, as the value ``name``."""
    if isinstance(left, Scores) and isinstance(right, View):
        return _mix(lift, left, right, name) if alpha == 1.0 else None
    if isinstance(left, View) and isinstance(right, View):
        return _scores(left, right, alpha)
    return None


def _heads(view: View, token: int, inner: int) -> tuple[Axes, int] | None:
    """Leading axes and head count of a view ``[..., token, inner]`` (indices from the end) of all heads."""
    base = view.base
    if base.integer or base.layout != BSF or len(view.axes) < 3:
        return None
    if view.axes[token] != axis(TOKEN, base.tokens) or token == inner:
        return None
    lead = view.axes[:-2]
    atoms = [atom for one in lead for atom in one]
    head = [atom for atom in atoms if atom.label == FEATURE]
    batch = [atom for atom in atoms if atom.label == BATCH]
    if len(head) + len(batch) != len(atoms) or len(head) > 1 or tuple(batch) != axis(BATCH, base.batch):
        return None
    heads = 1 if not head else int(head[0].size.number or 0)
    if heads < 1 or base.features % heads:
        return None
    size = base.features // heads
    if head and head[0].stride != size:
        return None
    return (lead, heads) if view.axes[inner] == axis(FEATURE, size) else None


def _lead(lead: Axes) -> tuple[tuple[tuple[str, Expr], ...], ...]:
    """Leading axes without strides: those of k and v differ from those of q when head sizes differ."""
    return tuple(tuple((atom.label, atom.size) for atom in one) for one in lead)


def _scores(q: View, k: View, alpha: float) -> Value | None:
    first, second = _heads(q, -2, -1), _heads(k, -1, -2)
    if first is None or second is None or first[1] != second[1] or _lead(first[0]) != _lead(second[0]):
        return None
    if q.base.features != k.base.features or q.base.tokens != k.base.tokens or q.base.batch != k.base.batch:
        return None
    keys: Axis = tuple(Atom(KEY, atom.size) for atom in k.axes[-1])
    axes = (*first[0], q.axes[-2], keys)
    return Scores(q.base, k.base, first[1], axes, q.scale * k.scale * alpha)


def _mix(lift: Lifter, probs: Scores, v: View, name: str) -> Value | None:
    """Probabilities times values: native Attention."""
    found = _heads(v, -2, -1)
    if found is None or not probs.normal or probs.nan or found[1] != probs.heads:
        return None
    if _lead(found[0]) != _lead(probs.axes[:-2]) or not _is_scores(probs) or v.scale != 1.0:
        return None
    if v.base.tokens != probs.k.tokens or v.base.batch != probs.q.batch:
        return None
    return emit(lift, probs, v, name)


def emit(lift: Lifter, probs: Scores, v: View, name: str) -> View | None:
    """The native node for complete probabilities; the result has the axes of ``v``."""
    if probs.key_mask in lift.graph.inputs:
        lift.same_extents(probs.key_mask, probs.q)
    bias = probs.bias[0] if probs.bias else ""
    if len(probs.bias) > 1:
        for other in probs.bias[1:]:
            shape = lift.out.types[bias].shape or ("?", "?", "?", "?")
            bias = lift.foreign("Add", [bias, other], "attention_bias", "float32", shape)
    inputs = [probs.q.name, probs.k.name, v.base.name, probs.key_mask, bias]
    attrs = {"heads": probs.heads, "scale": float(probs.scale), "mask_value": float(probs.mask_value)}
    why = UNROUNDED if probs.rounded else ""
    return lift.emit("Attention", inputs, attrs, replace(v.base, name=""), axes=v.axes, name=name, why=why)


def _is_scores(value: Scores) -> bool:
    """Whether the last two axes are queries and keys."""
    return value.axes[-2] == axis(TOKEN, value.q.tokens) and value.axes[-1] == axis(KEY, value.k.tokens)


def _four(value: Scores) -> bool:
    """Whether the axes are ``[B, H, S, S]``, as masks expect them; the head axis may have extent 1."""
    if len(value.axes) != 4 or not _is_scores(value):
        return False
    batch, head = value.axes[:2]
    return all(a.label == BATCH for a in batch) and all(a.label == FEATURE for a in head)


def combine(lift: Lifter, node: Node, left: Value | None, right: Value | None) -> Value | None:
    """Scores times or divided by a number, or plus a mask."""
    scores, other, other_name = (
        (left, right, node.inputs[1]) if isinstance(left, Scores) else (right, left, node.inputs[0])
    )
    if not isinstance(scores, Scores) or isinstance(other, Scores) or scores.normal:
        return None
    if isinstance(other, Unrounded):
        scores, other_name = replace(scores, rounded=True), other.name
    plain = not scores.key_mask and not scores.bias
    if isinstance(other, Constant) and other.array.size == 1 and other.array.ndim <= len(scores.axes):
        number = float(other.array.reshape(-1)[0])
        if node.op == "Mul" and plain:
            return replace(scores, scale=scores.scale * number)
        if node.op == "Div" and plain and scores is left and number != 0:
            return replace(scores, scale=scores.scale / number)
        if number == 0 and node.op == "Add":
            return scores
    if node.op != "Add" or not _four(scores):
        return None
    return add(lift, scores, other_name)


def add(lift: Lifter, scores: Scores, name: str) -> Scores | None:
    """Scores plus the value ``name``, as key mask where that is proven, else as a bias."""
    mask = lift.prober.additive(name, scores.heads)
    if mask is not None and (not mask.mask or not scores.key_mask):
        if not mask.mask:
            return scores
        if maskable(lift, mask.mask):
            return replace(scores, key_mask=mask.mask, mask_value=mask.value)
    relative = lift.prober.relative(name, scores.heads) if "RelativeBias" in OPS else None
    bias = _bias(lift, scores, name) if relative is None else _relative(lift, scores, relative)
    return None if bias is None else replace(scores, bias=[*scores.bias, bias])


def maskable(lift: Lifter, mask: str) -> bool:
    """Whether an input can be the engine's key mask: any integer type, 0 meaning hidden, and a mask to everybody.

    Token ids are none, though a mask may be computed from them: probing has seen them as 0 and 1 only.
    """
    readers = lift.consumers.get(mask, [])
    looked_up = any(node.op in ("Gather", "EmbedLayerNormalization") for node in readers)
    return not looked_up and lift.dtype(mask) in ("int64", "int32", "int8", "uint8", "bool", "int16")


def _relative(lift: Lifter, scores: Scores, found: RelativeBias) -> str | None:
    """Bias of the distance between query and key, from its table of buckets."""
    source = token_source(lift, scores.q.tokens)
    table = lift.get(found.table)
    if source is None or not isinstance(table, Constant):
        return None
    attrs = {"num_buckets": found.buckets, "max_distance": found.distance}
    tensor = Tensor("", "1HSS", ONE, scores.q.tokens, scores.heads)
    return lift.emit("RelativeBias", [lift.float32(table), source.base.name], attrs, tensor).base.name


def _bias(lift: Lifter, scores: Scores, name: str) -> str | None:
    """Name of a float32 ``[B or 1, H or 1, S or 1, S]`` value for the engine; None if the shape is not proven."""
    value = lift.get(name)
    wanted = [scores.q.batch, Expr.of(scores.heads), scores.q.tokens, scores.k.tokens]
    shape = lift.shape(name)
    if shape is None or len(shape) > 4:
        return None
    shaped = [Expr.of(1)] * (4 - len(shape)) + shape
    fits = all(a == b or (a == 1 and k < 3) for k, (a, b) in enumerate(zip(shaped, wanted, strict=True)))
    if not fits and not lift.prober.bias_shape(name, scores.heads):
        return None
    if isinstance(value, Constant):
        if value.array.dtype.name not in ("float16", "float32") or not fits:
            return None
        full = tuple(int(e.number or 1) for e in shaped)
        return lift.float32(value, ".bias", lambda a: a.reshape(full))
    dims = tuple(e.number if e.number is not None else repr(e) for e in (shaped if fits else wanted))
    if not fits:
        dims = ("?batch", "?heads", "?query", dims[3])
    current, dtype = name, lift.dtype(name)
    if dtype not in ("float32", "float16"):
        return None
    if dtype == "float16":
        current = lift.foreign("Cast", [current], name + ".float32", "float32", lift.out.types[name].shape or (), to=1)
    if len(shape) < 4:
        where = list(range(4 - len(shape)))
        if lift.opset >= 13:
            axes = lift.constant("axes", np.array(where, np.int64))
            current = lift.foreign("Unsqueeze", [current, axes], name + ".4d", "float32", dims)
        else:
            current = lift.foreign("Unsqueeze", [current], name + ".4d", "float32", dims, axes=where)
    return current


def softmax(value: Scores, along: int) -> Value | None:
    last = along in (-1, len(value.axes) - 1)
    return replace(value, normal=True) if last and not value.normal and _is_scores(value) else None


def where(lift: Lifter, node: Node, inputs: list[Value | None]) -> Value | None:
    """``Where`` with scores: a mask put in their place, or the clean-up of NaN after Softmax."""
    condition, yes, no = inputs
    if isinstance(condition, Scores):
        zero = isinstance(yes, Constant) and yes.array.size == 1 and not yes.array.any()
        clean = isinstance(no, Scores) and no.normal and condition.nan and replace(condition, nan=False) == no
        return no if zero and clean else None
    scores, fill, valid = (yes, no, True) if isinstance(yes, Scores) else (no, yes, False)
    if not isinstance(scores, Scores) or not isinstance(fill, Constant) or scores.normal or not _four(scores):
        return None
    value = float(fill.array.reshape(-1)[0]) if fill.array.size == 1 else 0.0
    if value > HIDDEN:
        return None
    found = lift.prober.condition(node.inputs[0], scores.heads)
    if found is None or found[1] != valid or (found[0] and scores.key_mask):
        return None
    if not found[0]:
        return scores
    return replace(scores, key_mask=found[0], mask_value=max(value, LOWEST)) if maskable(lift, found[0]) else None
