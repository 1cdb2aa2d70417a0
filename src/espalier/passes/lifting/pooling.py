"""Mean pooling over valid tokens: multiply by the mask, sum over the tokens, divide by their number."""

from __future__ import annotations

from dataclasses import replace

from espalier.ir.graph import Node
from espalier.passes.lifting.axes import TOKEN
from espalier.passes.lifting.lifter import Lifter
from espalier.passes.lifting.values import BF, BSF, Masked, Tensor, Value, View
from espalier.passes.symbolic import ONE


def masked(lift: Lifter, x: View, mask: str) -> Value | None:
    """A token tensor times an opaque value that equals its mask."""
    if x.base.layout != BSF or x.axes != x.base.axes():
        return None
    leaf = lift.prober.token_mask(mask)
    shape = lift.shape(mask)
    if leaf is None or (shape is not None and len(shape) != 3):
        return None
    return Masked(x, leaf, x.axes)


def total(value: Masked, along: int, keep: bool) -> Value | None:
    """The sum of masked tokens over the token axis."""
    k = along % len(value.axes)
    if value.summed or [atom.label for atom in value.axes[k]] != [TOKEN]:
        return None
    axes = value.axes[:k] + (((),) if keep else ()) + value.axes[k + 1 :]
    return replace(value, axes=axes, summed=True)


def divide(lift: Lifter, node: Node, left: Value | None, right: Value | None) -> Value | None:
    """The sum divided by the number of valid tokens: MaskedMean."""
    if not isinstance(left, Masked) or not left.summed or isinstance(right, Masked):
        return None
    epsilon = lift.prober.token_count(node.inputs[1], left.mask)
    if epsilon is None:
        return None
    x = lift.solid(left.x)
    lift.same_extents(left.mask, x)
    tensor = Tensor("", BF, x.batch, ONE, x.features)
    return lift.emit(
        "MaskedMean", [x.name, left.mask], {"epsilon": epsilon}, tensor, axes=left.axes, name=node.outputs[0]
    )
