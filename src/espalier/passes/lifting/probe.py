"""Recognising what a small subgraph computes by evaluating it.

Masks and position ids depend on a few integer inputs and on extents only, and exporters write them in endless ways.
Each such subgraph is evaluated on several small batches and compared with what the engine can do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from espalier.ir.ops import relative_bias
from espalier.passes.evaluate import EvaluationError, evaluate
from espalier.passes.lifting.values import Constant, Extents, View
from espalier.passes.symbolic import Expr

if TYPE_CHECKING:
    from espalier.passes.lifting.lifter import Lifter

SIZES = ((2, 5), (3, 7), (1, 4), (2, 6), (4, 3), (2, 1))
"""(batch, tokens) of the probing batches."""

LOWEST = float(np.finfo(np.float32).min)


@dataclass
class Trial:
    """One probing batch: the extents, the integer inputs and every value computed from them."""

    batch: int
    tokens: int
    symbols: dict[str, int]
    feeds: dict[str, np.ndarray]
    env: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyMask:
    """``(1 - mask[b, key]) * value``; ``value`` 0 when the mask does nothing."""

    mask: str
    value: float


@dataclass(frozen=True)
class RelativeBias:
    """``table[bucket(key - query)]`` per head, T5's bidirectional buckets."""

    table: str
    buckets: int
    distance: int


class Prober:
    """Evaluates ONNX subgraphs of one graph on probing batches. Results are cached by value name."""

    def __init__(self, lifter: Lifter) -> None:
        self.lifter = lifter
        self._trials: dict[str, list[Trial]] = {}
        self._leaves: dict[str, frozenset[str] | None] = {}
        self._relative: dict[tuple[str, int], RelativeBias | None] = {}
        self._symbols: frozenset[str] | None = None

    # --- evaluation --------------------------------------------------------------------------------------------

    def leaves(self, name: str) -> frozenset[str] | None:
        """Integer graph inputs that the value's content depends on; None if it depends on anything else."""
        if name in self._leaves:
            return self._leaves[name]
        found: set[str] = set()
        stack, seen = [name], {name}
        ok = True
        while stack and ok:
            current = stack.pop()
            value = self.lifter.get(current)
            if isinstance(value, Constant) or (isinstance(value, Extents) and self._settled(value)):
                continue
            if current in self.lifter.graph.inputs:
                ok = isinstance(value, View) and value.base.integer
                found.add(current)
                continue
            node = self.lifter.producers.get(current)
            if node is None or node.domain != "" or (isinstance(value, View) and not value.base.integer):
                ok = False
                continue
            if node.op in ("If", "Loop", "Scan"):
                ok = False
                continue
            for other in node.inputs:
                if other and other not in seen:
                    seen.add(other)
                    stack.append(other)
        self._leaves[name] = frozenset(found) if ok else None
        return self._leaves[name]

    def _settled(self, value: Extents) -> bool:
        """Whether the entries are functions of the graph inputs' extents alone."""
        if self._symbols is None:
            types = (self.lifter.graph.types[name].shape or () for name in self.lifter.graph.inputs)
            self._symbols = frozenset(d for shape in types for d in shape if isinstance(d, str))
        return all(e.symbols() <= self._symbols for e in value.array.ravel() if isinstance(e, Expr))

    def trials(self, kind: str) -> list[Trial]:
        """Probing batches. ``mask``: every integer input holds 0 and 1; ``ids``: small token ids; ``zero``: zeros."""
        if kind not in self._trials:
            self._trials[kind] = [self._trial(kind, k, *size) for k, size in enumerate(SIZES)]
        return self._trials[kind]

    def _trial(self, kind: str, number: int, batch: int, tokens: int) -> Trial:
        rng = np.random.default_rng(number)
        graph = self.lifter.graph
        symbols: dict[str, int] = {}
        feeds: dict[str, np.ndarray] = {}
        for name in graph.inputs:
            value = self.lifter.get(name)
            declared = graph.types[name].shape or ()
            for extent, size in zip(declared, (batch, tokens), strict=False):
                if isinstance(extent, str):
                    symbols.setdefault(extent, size)
            if not (isinstance(value, View) and value.base.integer):
                continue
            shape = (value.base.batch.at(symbols), value.base.tokens.at(symbols))
            if kind == "ids":
                array = rng.integers(0, 4, shape) * rng.integers(0, 2, shape) + rng.integers(0, 3)
            elif kind == "zero":
                array = np.zeros(shape, np.int64)
            else:
                array = _mask(number + 3 * len(feeds), rng, shape)
            feeds[name] = array.astype(graph.types[name].dtype)
        first = next(iter(feeds.values()), np.zeros((batch, tokens)))
        return Trial(first.shape[0], first.shape[1], symbols, feeds)

    def evaluate(self, name: str, trial: Trial) -> np.ndarray:
        """The value on a probing batch. Raises EvaluationError."""
        env = trial.env
        stack = [name]
        while stack:
            current = stack[-1]
            if current in env:
                stack.pop()
                continue
            value = self.lifter.get(current)
            if isinstance(value, Constant):
                env[current] = value.array
            elif isinstance(value, Extents) and self._settled(value):
                env[current] = self._extents(current, value, trial)
            elif current in trial.feeds:
                env[current] = trial.feeds[current]
            else:
                node = self.lifter.producers.get(current)
                if node is None:
                    raise EvaluationError(f"{current} is not computed from integer inputs")
                missing = [n for n in node.inputs if n and n not in env]
                if missing:
                    if len(stack) > 100_000:
                        raise EvaluationError("the subgraph is cyclic")
                    stack += missing
                    continue
                inputs = [env[n] if n else None for n in node.inputs]
                results = evaluate(node, self.lifter.attributes(node), inputs, self.lifter.opset)
                for output, result in zip(node.outputs, results, strict=False):
                    env[output] = result
                if current not in env:
                    raise EvaluationError(f"{node.op} made no {current}")
            if current in env:
                stack.pop()
        return env[name]

    def _extents(self, name: str, value: Extents, trial: Trial) -> np.ndarray:
        try:
            entries = [e.at(trial.symbols) if isinstance(e, Expr) else e for e in value.array.ravel()]
        except KeyError as error:
            raise EvaluationError(f"the extent {error} is unknown") from error
        dtype = self.lifter.dtype(name)
        return np.array(entries, dtype if dtype not in ("unknown", "object") else np.int64).reshape(value.array.shape)

    def results(self, name: str, kind: str) -> list[tuple[Trial, np.ndarray]] | None:
        """The value on every probing batch; None when it cannot be evaluated."""
        if self.leaves(name) is None:
            return None
        try:
            return [(trial, self.evaluate(name, trial)) for trial in self.trials(kind)]
        except EvaluationError:
            return None

    # --- attention masks -----------------------------------------------------------------------------------------

    def additive(self, name: str, heads: int) -> KeyMask | None:
        """The key mask that an additive ``[B, H, S, S]`` value stands for."""
        results = self.results(name, "mask")
        if results is None:
            return None
        if all(_spread(a, t, heads) is not None and not a.any() for t, a in results):
            return KeyMask("", 0.0)
        for leaf in sorted(self.leaves(name) or ()):
            lowest: float | None = None
            for trial, array in results:
                spread = _spread(array, trial, heads)
                if spread is None:
                    return None
                hidden = np.broadcast_to((trial.feeds[leaf] == 0)[:, None, None, :], spread.shape)
                values = np.unique(spread[hidden])
                if (
                    spread[~hidden].any()
                    or len(values) > 1
                    or (lowest is not None and len(values) and values[0] != lowest)
                ):
                    break
                if len(values):
                    lowest = float(values[0])
            else:
                if lowest is not None:
                    return KeyMask(leaf, max(lowest, LOWEST))
        return None

    def condition(self, name: str, heads: int) -> tuple[str, bool] | None:
        """(mask, True) if the bool ``[B, H, S, S]`` value is true where keys are valid; False where they are hidden."""
        results = self.results(name, "mask")
        if results is None:
            return None
        if all(a.dtype == bool and a.all() for _, a in results):
            return "", True
        if all(a.dtype == bool and not a.any() for _, a in results):
            return "", False
        for leaf in sorted(self.leaves(name) or ()):
            for valid in (True, False):
                for trial, array in results:
                    spread = _spread(array, trial, heads)
                    if spread is None or spread.dtype != bool:
                        return None
                    expected = ((trial.feeds[leaf] != 0) == valid)[:, None, None, :]
                    if (spread != expected).any():
                        break
                else:
                    return leaf, valid
        return None

    def bias_shape(self, name: str, heads: int) -> bool:
        """Whether the value's shape is ``[B or 1, H or 1, S or 1, S]`` on every probing batch."""
        results = self.results(name, "mask")
        return results is not None and all(
            a.ndim == 4 and a.shape[3] == t.tokens and _spread(a, t, heads) is not None for t, a in results
        )

    def relative(self, name: str, heads: int) -> RelativeBias | None:
        """The table and buckets if the ``[B or 1, H, S, S]`` value is a relative position bias."""
        key = (name, heads)
        if key not in self._relative:
            self._relative[key] = self._find_relative(name, heads)
        return self._relative[key]

    def _find_relative(self, name: str, heads: int) -> RelativeBias | None:
        if self.leaves(name) != frozenset():
            return None
        tables = [t for t in self._tables(name) if t.array.shape[1] == heads and t.array.shape[0] % 2 == 0]
        for distance in (128, 64, 256):
            try:
                # Long enough that every bucket is met, the farthest included.
                trial = self._trial("mask", 3, 1, distance + distance // 4)
                array = self.evaluate(name, trial) if tables else np.zeros(0)
            except EvaluationError:
                return None
            for table in tables:
                buckets = table.array.shape[0]
                if buckets < 4 or distance <= buckets // 4 or array.ndim != 4:
                    continue
                ids = np.zeros((trial.batch, trial.tokens), np.int64)
                expected = relative_bias(table.array, ids, buckets, distance)
                if array.shape[1:] == expected.shape[1:] and (array == expected).all():
                    return RelativeBias(table.name, buckets, distance)
        return None

    def _tables(self, name: str) -> list[Constant]:
        """Constant matrices that the value's subgraph gathers rows of."""
        found, stack, seen = [], [name], {name}
        while stack:
            node = self.lifter.producers.get(stack.pop())
            if node is None:
                continue
            value = self.lifter.get(node.inputs[0]) if node.op == "Gather" else None
            if isinstance(value, Constant) and value.array.ndim == 2 and value.array.dtype.kind == "f":
                found.append(value)
            new = [n for n in node.inputs if n and n not in seen]
            seen.update(new)
            stack += new
        return found

    # --- masks of tokens -----------------------------------------------------------------------------------------

    def token_mask(self, name: str) -> str | None:
        """The input that the value equals as 0 and 1, laid out ``[B, S]``, ``[B, S, 1]`` or ``[B, S, F]``."""
        results = self.results(name, "mask")
        for leaf in sorted(self.leaves(name) or ()):
            if results and all(
                a.ndim in (2, 3) and a.shape[:2] == t.feeds[leaf].shape
                and (a == (t.feeds[leaf] != 0).reshape(a.shape[:2] + (1,) * (a.ndim - 2))).all()
                for t, a in results
            ):  # fmt: skip
                return leaf
        return None

    def token_count(self, name: str, mask: str) -> float | None:
        """``epsilon`` if the value is ``max(sum(mask), epsilon)`` per sequence."""
        results = self.results(name, "mask")
        zeros = self.results(name, "zero")
        if not results or not zeros:
            return None
        lowest = np.unique(np.concatenate([a.ravel() for _, a in zeros]))
        if len(lowest) != 1 or not 0 <= lowest[0] < 1:
            return None
        for trial, array in results:
            count = (trial.feeds[mask] != 0).sum(1)
            if not array.ndim or array.shape[0] != count.size or array.ndim > 3:
                return None
            if (array != count.reshape((-1,) + (1,) * (array.ndim - 1))).any():
                return None
        return float(lowest[0])

    # --- ids -----------------------------------------------------------------------------------------------------

    def constant_id(self, name: str) -> tuple[int, list[tuple[int, ...]]] | None:
        """The id, if every entry is always the same one, and the shapes met."""
        both = [self.results(name, kind) for kind in ("mask", "ids")]
        arrays = [a for results in both if results for _, a in results]
        if not all(both) or not arrays or not arrays[0].size:
            return None
        first = int(arrays[0].ravel()[0])
        return (first, [a.shape for a in arrays]) if all((a == first).all() for a in arrays) else None

    def positions(self, name: str) -> tuple[int, int] | None:
        """(offset, rank) if the value is ``offset + column`` of shape ``[S]``, ``[1, S]`` or ``[B, S]``.

        The rank is given as 1, 2 (``[1, S]``) or 3 (``[B, S]``).
        """
        both = [self.results(name, kind) for kind in ("mask", "ids")]
        if not all(both):
            return None
        pairs = [pair for results in both if results for pair in results]
        first = pairs[0][1]
        if not first.size or first.dtype.kind not in "iu":
            return None
        offset = int(first.ravel()[0])
        rows = {a.shape[0] for _, a in pairs if a.ndim == 2}
        for trial, array in pairs:
            if array.ndim != first.ndim or array.ndim not in (1, 2) or array.shape[-1] != trial.tokens:
                return None
            if array.ndim == 2 and array.shape[0] != (1 if rows == {1} else trial.batch):
                return None
            if (array != offset + np.arange(trial.tokens)).any():
                return None
        return offset, 1 if first.ndim == 1 else 2 if rows == {1} else 3

    def positions_from_ids(self, name: str) -> tuple[str, int] | None:
        """(ids, padding id) if the value is RoBERTa's ``cumsum(ids != pad) * (ids != pad) + pad``."""
        results = self.results(name, "ids")
        masks = self.results(name, "mask")
        if not results or not masks:
            return None
        for leaf in sorted(self.leaves(name) or ()):
            for pad in range(4):
                for trial, array in [*results, *masks]:
                    real = trial.feeds[leaf] != pad
                    if array.shape != real.shape or (array != np.cumsum(real, 1) * real + pad).any():
                        break
                else:
                    return leaf, pad
        return None


def _mask(number: int, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A mask with a valid token in every row: all ones, right-padded, left-padded or with holes."""
    columns = np.arange(shape[1])[None, :]
    lengths = rng.integers(1, shape[1] + 1, (shape[0], 1))
    kinds = [columns < lengths, columns >= shape[1] - lengths, rng.integers(0, 2, shape) == 1, columns >= 0]
    mask = np.broadcast_to(kinds[number % 4], shape)
    mask = mask.copy()
    mask[~mask.any(1), -1] = True
    return mask


def _spread(array: np.ndarray, trial: Trial, heads: int) -> np.ndarray | None:
    """The array broadcast over ``[B, H, S, S]``; None if it does not."""
    try:
        return np.broadcast_to(array, (trial.batch, heads, trial.tokens, trial.tokens))
    except ValueError:
        return None
