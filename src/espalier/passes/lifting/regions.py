"""Recognising activations, LayerNorm and L2 normalisation by what they compute.

A region is everything computed from one value by elementwise operators (and, for rows, reductions over the
features) whose other operands are constants. It is evaluated in float64 at probing points and compared with the
functions the engine knows, so the way an exporter writes GELU or LayerNorm does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.ops import ACTIVATIONS
from espalier.passes.evaluate import EvaluationError, evaluate
from espalier.passes.lifting.values import BF, BSF, SF, Constant, Recognised, Value, View

if TYPE_CHECKING:
    from espalier.passes.lifting.lifter import Lifter

MEMBERS = 40
"""Values. A region larger than this is not one activation or normalisation."""

CURVED = frozenset(
    {"Erf", "Tanh", "Sigmoid", "Exp", "Softplus", "Relu", "Clip", "Max", "Min", "Gelu", "HardSigmoid", "Elu"}
)
POINTWISE = CURVED | frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Abs", "Reciprocal", "Cast", "Identity", "Log", "Where", "Sum",
})  # fmt: skip
ROWWISE = POINTWISE | frozenset({"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "Expand", "Unsqueeze"})
REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"})

POINTS = np.concatenate([np.linspace(-12, 12, 97), [-1e-3, 1e-3, -60.0, 60.0, 0.123, -0.77]])

KINDS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "softplus", "tanh", "sigmoid", "elu", "mish")


def activate(lift: Lifter, x: Value | None, kind: str, name: str) -> View | None:
    """Emit an Activation on any view of a native tensor."""
    if not isinstance(x, View) or x.base.integer or x.base.layout not in (BSF, SF, BF) or kind not in ACTIVATIONS:
        return None
    solid = lift.solid(x)
    return lift.emit("Activation", [solid.name], {"kind": kind}, replace(solid, name=""), axes=x.axes, name=name)


def normalise(lift: Lifter, x: View, epsilon: float, name: str) -> View:
    solid = lift.solid(x)
    return lift.emit("L2Normalize", [solid.name], {"epsilon": epsilon}, replace(solid, name=""), axes=x.axes, name=name)


def apply(lift: Lifter, name: str, found: Recognised) -> View | None:
    """Emit the native node for a recognised result."""
    kind, source, attrs = found
    x = lift.get(source)
    if not isinstance(x, View):
        return None
    if kind == "activation":
        return activate(lift, x, attrs["kind"], name)
    if kind == "l2":
        return normalise(lift, x, attrs["epsilon"], name)
    solid = lift.solid(x)
    gamma = lift.constant(name + ".gamma", attrs["gamma"])
    beta = lift.constant(name + ".beta", attrs["beta"]) if attrs["beta"].any() else ""
    tensor = replace(solid, name="")
    return lift.emit(
        "LayerNorm", [solid.name, gamma, beta], {"epsilon": attrs["epsilon"]}, tensor, axes=x.axes, name=name
    )


# --- regions -------------------------------------------------------------------------------------------------------


def _region(lift: Lifter, source: str, ops: frozenset[str], width: int, rank: int) -> list[Node]:
    """Nodes computed from ``source`` and constants alone, in order. ``width``: features, 1 for scalars only."""
    members = {source}
    nodes: list[Node] = []
    queue = [source]
    while queue and len(nodes) < MEMBERS:
        for node in lift.consumers.get(queue.pop(0), []):
            if node.domain != "" or node.op not in ops or len(node.outputs) != 1 or node.outputs[0] in members:
                continue
            if _belongs(lift, node, members, width, rank):
                nodes.append(node)
                members.add(node.outputs[0])
                queue.append(node.outputs[0])
    return nodes


def _belongs(lift: Lifter, node: Node, members: set[str], width: int, rank: int) -> bool:
    if node.op in REDUCTIONS:
        attrs = lift.attributes(node)
        extra = lift.ints(lift.get(node.inputs[1])) if len(node.inputs) > 1 and node.inputs[1] else None
        axes = attrs.get("axes") or extra
        return node.inputs[0] in members and axes in ([-1], [rank - 1])
    if node.op == "Expand":
        return node.inputs[0] in members and node.inputs[1] not in members
    if node.op == "Unsqueeze":
        attrs = lift.attributes(node)
        extra = lift.ints(lift.get(node.inputs[1])) if len(node.inputs) > 1 else None
        return node.inputs[0] in members and (attrs.get("axes") or extra) in ([-1], [rank - 1])
    for name in node.inputs:
        if not name or name in members:
            continue
        value = lift.get(name)
        if not isinstance(value, Constant):
            return False
        array = value.array
        if array.size != 1 and not (array.size == width and array.shape[-1] == width):
            return False
        if array.ndim > rank:
            return False
    return True


def _run(lift: Lifter, nodes: list[Node], source: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The region's values on ``x`` in float64; stops quietly at a node that cannot be evaluated."""
    env = {source: x}
    for node in nodes:
        inputs: list[np.ndarray | None] = []
        for name in node.inputs:
            value = lift.get(name) if name else None
            if name in env:
                inputs.append(env[name])
            elif isinstance(value, Constant):
                array = value.array
                inputs.append(
                    array.astype(np.float64) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array
                )
            else:
                inputs.append(None)
        attrs = lift.attributes(node)
        if any(name and name in lift.producers and name not in env for name in node.inputs[:1]):
            continue
        first = inputs[0]
        if node.op in ("Expand", "Identity") or (
            node.op == "Cast" and lift.dtype(node.outputs[0]).startswith(("float", "bfloat"))
        ):
            if first is not None:
                env[node.outputs[0]] = first
            continue
        try:
            if node.op in REDUCTIONS:
                inputs, attrs = [first, np.array([-1])], {"keepdims": attrs.get("keepdims", 1)}
            elif node.op == "Unsqueeze":
                inputs, attrs = [first, np.array([-1])], {}
            env[node.outputs[0]] = evaluate(node, attrs, inputs, lift.opset)[0]
        except EvaluationError:
            continue
    return env


def _coarse(lift: Lifter, nodes: list[Node]) -> bool:
    """Whether the region's constants were rounded to half precision."""
    values = [lift.get(name) for node in nodes for name in node.inputs if name]
    return any(isinstance(v, Constant) and v.array.dtype.name in ("float16", "bfloat16") for v in values)


def elementwise(lift: Lifter, source: str, view: View) -> None:
    """Look for activations of ``source`` and note their results in ``lift.recognised``."""
    if source in lift.tried or view.base.layout not in (BSF, SF, BF):
        return
    lift.tried.add(source)
    if not any(n.op in POINTWISE for n in lift.consumers.get(source, [])):
        return
    nodes = _region(lift, source, POINTWISE, 1, len(view.axes))
    if len(nodes) < 2 or not any(n.op in CURVED for n in nodes):
        return
    env = _run(lift, nodes, source, POINTS)
    tolerance = (2e-3 if _coarse(lift, nodes) else 2e-6) * (1 + np.abs(POINTS))
    for node in nodes:
        result = env.get(node.outputs[0])
        if result is None or result.shape != POINTS.shape or result.dtype.kind != "f":
            continue
        errors = {kind: np.abs(result - known) for kind, known in _known().items()}
        fits = {k: float(e.max()) for k, e in errors.items() if (e <= tolerance).all()}
        if fits:
            best = min(fits, key=lambda k: fits[k])
            lift.recognised.setdefault(node.outputs[0], ("activation", source, {"kind": best}))


_KNOWN: dict[str, np.ndarray] = {}


def _known() -> dict[str, np.ndarray]:
    """The engine's activations at the probing points."""
    if not _KNOWN:
        with np.errstate(all="ignore"):
            _KNOWN.update({kind: ACTIVATIONS[kind](POINTS) for kind in KINDS if kind in ACTIVATIONS})
    return _KNOWN


# --- rows ------------------------------------------------------------------------------------------------------------


def rowwise(lift: Lifter, name: str) -> None:
    """Look for normalisations of the rows that a reduction reads (``name``) or of what those were computed from."""
    sources = [name]
    node = lift.producers.get(name)
    if node is not None and node.op in ("Pow", "Mul", "Abs", "Cast"):
        sources.append(node.inputs[0])
    for source in sources:
        value = lift.get(source)
        if source in lift.tried_rows or not isinstance(value, View) or value.base.layout not in (BSF, SF, BF):
            continue
        lift.tried_rows.add(source)
        width = value.base.features
        if value.base.integer or width < 2 or not value.axes or [a.size for a in value.axes[-1]] != [width]:
            continue
        nodes = _region(lift, source, ROWWISE, width, len(value.axes))
        if any(n.op in REDUCTIONS for n in nodes):
            _rows(lift, nodes, source, width)


SCALES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def _samples(width: int) -> np.ndarray:
    """Rows: zero, three huge, one per scale, then three of everyday size with an offset."""
    rng = np.random.default_rng(width)
    noise = rng.normal(size=(4 + len(SCALES) + 3, width))
    # Variance far above any epsilon: gamma is read off these rows.
    factors = np.array([0.0, 1e6, 1e6, 1e6, *SCALES, 1.0, 3.0, 0.05])
    rows: np.ndarray = noise * factors[:, None]
    rows[-3:] += np.array([[0.5], [-2.0], [0.1]])
    return rows


def _rows(lift: Lifter, nodes: list[Node], source: str, width: int) -> None:
    x = _samples(width)
    env = _run(lift, nodes, source, x)
    for node in nodes:
        y = env.get(node.outputs[0])
        if y is None or y.shape != x.shape or y.dtype.kind != "f" or node.op in REDUCTIONS:
            continue
        found = _as_layer_norm(x, y)
        if found is not None:
            gamma, beta, epsilon = found
            attrs = {"gamma": gamma, "beta": beta, "epsilon": epsilon}
            lift.recognised.setdefault(node.outputs[0], ("layer_norm", source, attrs))
            continue
        norm = _as_l2(x, y, lambda rows, out=node.outputs[0]: _run(lift, nodes, source, rows)[out])  # type: ignore[misc]
        if norm is not None:
            lift.recognised.setdefault(node.outputs[0], ("l2", source, {"epsilon": norm}))


def _as_layer_norm(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float] | None:
    """(gamma, beta, epsilon) if ``y`` is the LayerNorm of the rows ``x``."""
    if not np.isfinite(y[1:]).all():
        return None
    centred = x - x.mean(1, keepdims=True)
    variance = (centred * centred).mean(1, keepdims=True)
    with np.errstate(all="ignore"):
        # A row of zeros gives beta, unless epsilon is 0 and it gives NaN.
        normal = centred[1:4] / np.sqrt(variance[1:4])
        pair = np.argsort(normal, 0)
        columns = np.arange(x.shape[1])
        low, high = pair[0], pair[-1]
        slope = (y[1:4][high, columns] - y[1:4][low, columns]) / (normal[high, columns] - normal[low, columns])
        beta = y[0] if np.isfinite(y[0]).all() else y[1:4][high, columns] - slope * normal[high, columns]
        gamma = slope.astype(np.float32)
        beta = beta.astype(np.float32)
        if not gamma.any():
            return None
        best, epsilon = np.inf, 0.0
        for row, scale in enumerate(SCALES, 4):
            expected = slope * centred[row]
            ratio = float(((y[row] - beta) * expected).sum() / (expected * expected).sum())
            if ratio <= 0 or not np.isfinite(ratio):
                return None
            guess = 1 / ratio**2 - float(variance[row, 0])
            # The estimate is best where the row's variance is about epsilon.
            if guess > 0 and abs(np.log(guess / scale**2)) < best:
                best, epsilon = abs(np.log(guess / scale**2)), guess
        epsilon = float(np.float32(epsilon))
        model = gamma.astype(np.float64) * centred / np.sqrt(variance + epsilon) + beta
    error = np.abs(y[1:] - model[1:])
    size = np.abs(gamma) * np.abs(centred[1:]) / np.sqrt(variance[1:] + epsilon) + np.abs(beta) + 1e-3
    return (gamma, beta, epsilon) if (error <= 2e-6 * size).all() else None


def _as_l2(x: np.ndarray, y: np.ndarray, again: Callable[[np.ndarray], np.ndarray]) -> float | None:
    """``epsilon`` if ``y`` is ``x / max(norm, epsilon)``."""
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    big = [1, 2, 3, -3, -2, -1]
    if not np.isfinite(y[big]).all() or (np.abs(y[big] * norm[big] - x[big]) > 1e-6 * norm[big]).any():
        return None
    unit = x[1:2] / norm[1:2]
    tiny = again(np.repeat(unit * 1e-30, 2, 0))
    if not np.isfinite(tiny).all():
        return float(np.finfo(np.float32).tiny)
    size = float(np.sqrt((tiny[0] * tiny[0]).sum()))
    epsilon = float(np.float32(1e-30 / size)) if size < 0.5 else float(np.finfo(np.float32).tiny)
    near = np.array([[0.3], [0.9], [1.1], [3.0]]) * epsilon
    expected = unit * near / np.maximum(near, epsilon)
    return epsilon if size >= 0.5 or np.allclose(again(unit * near), expected, rtol=1e-5, atol=1e-7) else None
