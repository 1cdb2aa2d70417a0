"""How the axes of a tensor map onto batch, token and feature.

An axis is a tuple of *atoms*, outermost first. ``[B*S, F]`` has the axes ``((B, S), (F,))``; heads split the
feature atom in two: ``[B, H, S, D]`` is ``((B,), (F/D,), (S,), (F%D,))``. An axis of extent 1 has no atoms.
Reshapes and transposes only move atoms around.
"""

from __future__ import annotations

from dataclasses import dataclass

from espalier.passes.symbolic import ONE, Expr

BATCH, TOKEN, FEATURE, KEY = "B", "S", "F", "K"
"""``KEY`` is the key side's token axis of attention scores, ``TOKEN`` the query side's."""


@dataclass(frozen=True)
class Atom:
    """``size`` steps of ``stride`` along one dimension (``label``) of the base tensor."""

    label: str
    size: Expr
    stride: int = 1


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def axis(label: str, size: int | Expr, stride: int = 1) -> Axis:
    """An axis of one atom; of none if its extent is 1."""
    extent = Expr.of(size)
    return () if extent == 1 else (Atom(label, extent, stride),)


def extent(one: Axis) -> Expr:
    total = ONE
    for atom in one:
        total = total * atom.size
    return total


def shape_of(axes: Axes) -> list[Expr]:
    return [extent(a) for a in axes]


def atoms(axes: Axes) -> list[Atom]:
    return [atom for one in axes for atom in one]


def _merged(one: list[Atom]) -> Axis:
    """Neighbouring parts of one split dimension joined again."""
    out: list[Atom] = []
    for atom in one:
        if atom.size == 1:
            continue
        if out and out[-1].label == atom.label:
            outer, inner = out[-1].size, atom.size.number
            if inner is not None and out[-1].stride == inner * atom.stride:
                out[-1] = Atom(atom.label, outer * inner, atom.stride)
                continue
        out.append(atom)
    return tuple(out)


def reshape(axes: Axes, target: list[Expr]) -> Axes | None:
    """The axes after a reshape to ``target`` (no -1 or 0 left in it); None if atoms do not fit its axes."""
    left = atoms(axes)
    result: list[Axis] = []
    for want in target:
        group: list[Atom] = []
        rest: Expr | None = want
        while rest != 1:
            if not left or rest is None:
                return None
            atom = left.pop(0)
            smaller = rest.over(atom.size)
            if smaller is not None:
                group.append(atom)
                rest = smaller
                continue
            size, part = atom.size.number, rest.number
            if size is None or part is None or part <= 0 or size % part:
                return None
            inner = size // part
            group.append(Atom(atom.label, Expr.of(part), atom.stride * inner))
            left.insert(0, Atom(atom.label, Expr.of(inner), atom.stride))
            rest = ONE
        result.append(_merged(group))
    return None if left else tuple(result)


def resolve(shape: list[Expr], target: list[Expr], allowzero: bool) -> list[Expr] | None:
    """``target`` of a Reshape with its 0 and -1 replaced; None when -1 has no exact value."""
    out = list(target)
    for k, want in enumerate(out):
        if want == 0 and not allowzero:
            if k >= len(shape):
                return None
            out[k] = shape[k]
    unknown = [k for k, want in enumerate(out) if want == -1]
    if len(unknown) > 1:
        return None
    if unknown:
        rest: Expr | None = ONE
        for size in shape:
            rest = rest * size if rest is not None else None
        for k, want in enumerate(out):
            if k != unknown[0]:
                rest = rest.over(want) if rest is not None else None
        if rest is None:
            return None
        out[unknown[0]] = rest
    return out


def relabel(axes: Axes, old: str, new: str) -> Axes:
    return tuple(tuple(Atom(new if a.label == old else a.label, a.size, a.stride) for a in one) for one in axes)
