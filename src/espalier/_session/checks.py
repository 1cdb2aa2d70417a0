"""Checks of what is passed to a session. Every message says what was wrong, expected, got, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.errors import GraphError, InputNameError, InputShapeError, InputTypeError
from espalier.ir.graph import Graph, Node, TensorType
from espalier.passes.partition import Program

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_PLAIN = frozenset({"float16", "float32", "float64", "bool"} | _INTEGERS)
_NUMPY = {name: np.dtype(name) for name in _PLAIN}


def suggest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" when one of the known names is close, else an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_feeds(feeds: Any) -> Mapping[str, Any]:
    """``feeds`` itself when it is a mapping. Raises InputTypeError."""
    if not isinstance(feeds, Mapping):
        raise InputTypeError(
            f"input_feed must be a dict of input name to array; got {type(feeds).__name__}: "
            "call run(output_names, {name: array, ...})"
        )
    return feeds


def check_names(given: Iterable[str], expected: Sequence[str], optional: Iterable[str] = ()) -> None:
    """Every expected input is there and nothing else is. Raises InputNameError."""
    given = list(given)
    allowed = {*expected, *optional}
    for name in given:
        if name not in allowed:
            raise InputNameError(
                f"the model has no input {name!r}: it takes {_listed(expected)}{suggest(name, expected)}"
            )
    missing = [name for name in expected if name not in given]
    if missing:
        raise InputNameError(f"missing {_listed(missing)}: the model takes {_listed(expected)}, got {_listed(given)}")


def choose_outputs(names: Sequence[str] | None, outputs: Sequence[str]) -> list[str]:
    """The outputs asked for, all of them for None or an empty list. Raises InputNameError or InputTypeError."""
    if names is None:
        return list(outputs)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputTypeError(f"output_names must be a list of names or None; got {names!r}")
    for name in names:
        if name not in outputs:
            raise InputNameError(f"the model has no output {name!r}: it has {_listed(outputs)}{suggest(name, outputs)}")
    return list(names) or list(outputs)


def check_arrays(program: Program, feeds: Mapping[str, Any]) -> dict[str, int]:
    """Type, rank and extents of every input. Returns the extents of symbolic dimensions.

    Raises InputTypeError or InputShapeError.
    """
    extents: dict[str, tuple[int, str]] = {}
    for name in program.inputs:
        kind = program.types.get(name)
        if kind is not None:
            check_array(name, feeds[name], kind)
            _bind(name, feeds[name].shape, kind, extents)
    return {symbol: extent for symbol, (extent, _) in extents.items()}


def check_array(name: str, array: Any, kind: TensorType) -> None:
    """One input against its type: an array of that dtype, rank and fixed extents."""
    if not isinstance(array, np.ndarray):
        raise InputTypeError(
            f"input {name!r} must be a NumPy array of {kind.dtype}; got {type(array).__name__}: "
            f"pass numpy.asarray(value, dtype=numpy.{kind.dtype})"
        )
    wanted = _NUMPY.get(kind.dtype)
    if wanted is None or array.dtype != wanted:  # NumPy takes float64 to equal None
        _check_dtype(name, array.dtype, kind)
    if kind.shape is None:
        return
    if array.ndim != len(kind.shape):
        raise InputShapeError(
            f"input {name!r} must have {len(kind.shape)} dimensions {_shape(kind)}; got {array.ndim}, "
            f"shape {array.shape}{_hint(array, kind)}"
        )
    for axis, (extent, wanted_extent) in enumerate(zip(array.shape, kind.shape, strict=True)):
        if isinstance(wanted_extent, int) and extent != wanted_extent:
            raise InputShapeError(
                f"input {name!r} must have extent {wanted_extent} on axis {axis} {_shape(kind)}; "
                f"got {extent}, shape {array.shape}: reshape it, or export the model with that axis dynamic"
            )


def _check_dtype(name: str, dtype: np.dtype[Any], kind: TensorType) -> None:
    wanted = "object" if kind.dtype in ("str", "string") else kind.dtype
    if dtype.name != wanted and not (wanted == "object" and dtype.kind in "OUS"):
        raise InputTypeError(
            f"input {name!r} must be {kind.dtype}; got {dtype.name}: pass {name}.astype(numpy.{kind.dtype})"
        )
    if not dtype.isnative:
        raise InputTypeError(
            f"input {name!r} must be in this machine's byte order; got {dtype.str}: "
            f"pass {name}.astype(numpy.{kind.dtype})"
        )


def _bind(name: str, shape: tuple[int, ...], kind: TensorType, extents: dict[str, tuple[int, str]]) -> None:
    for axis, (extent, symbol) in enumerate(zip(shape, kind.shape or (), strict=False)):
        if not isinstance(symbol, str) or symbol.startswith("?"):
            continue
        known, owner = extents.setdefault(symbol, (extent, name))
        if known != extent:
            raise InputShapeError(
                f"inputs disagree on {symbol!r}: {owner!r} has {known}, {name!r} has {extent} on axis {axis}, "
                f"shape {shape}; give both the same extent"
            )


def diagnose(program: Program, feeds: Mapping[str, Any], expected: Sequence[str], optional: Iterable[str]) -> None:
    """After ONNX Runtime refused a run: raise a clearer error where the inputs do not fit the model's own types."""
    check_names(feeds, expected, optional)
    for name in expected:
        kind = program.types.get(name)
        if kind is not None and kind.dtype in _PLAIN:
            check_array(name, feeds[name], kind)


@dataclass(frozen=True)
class ValueCheck:
    """What the values of one input of a native segment must satisfy.

    kind ``ids``: ``0 <= value < limit``; ``columns``: ``offset + columns <= limit``; ``counted`` (RoBERTa's positions):
    ``offset + (values that differ from offset) < limit``, per row; ``mask``: values 0 or 1.
    """

    kind: str
    name: str
    limit: int = 0
    offset: int = 0
    table: str = ""

    def __call__(self, array: np.ndarray) -> None:
        """Raises InputShapeError, or MaskValueError for mask values other than 0 and 1."""
        if array.size == 0:
            return
        if self.kind == "ids":
            if _highest(array) >= self.limit:
                low, high = int(array.min()), int(array.max())
                raise InputShapeError(
                    f"input {self.name!r} must hold ids from 0 to {self.limit - 1} (the rows of table {self.table!r}); "
                    f"got {low if low < 0 else high}: use the tokenizer that belongs to this model"
                )
        elif self.kind == "columns":
            self._long(array.shape[-1] + self.offset, array.shape[-1])
        elif self.kind == "counted":
            self._long(int((array != self.offset).sum(axis=-1).max()) + self.offset + 1, array.shape[-1])
        elif array.dtype != np.bool_ and not _holds_flags(array):
            odd = array[(array != 0) & (array != 1)].flat[0]
            raise MaskValueError(
                f"mask {self.name!r} must hold only 0 (padding) and 1 (token); got {odd}: "
                f"pass ({self.name} != 0).astype(numpy.{array.dtype.name})"
            )

    def _long(self, needed: int, length: int) -> None:
        if needed > self.limit:
            room = self.limit - (needed - length)
            raise InputShapeError(
                f"input {self.name!r} has {length} tokens, but the position table {self.table!r} has room for {room}: "
                "truncate the text, or split it into shorter passages"
            )


def _highest(array: np.ndarray) -> int:
    """The highest integer, where a negative one counts as beyond all others: one pass instead of two."""
    return int(array.view(_UNSIGNED[array.dtype.itemsize]).max())


def _holds_flags(array: np.ndarray) -> bool:
    if array.dtype.kind in "iu":
        return _highest(array) <= 1
    return bool(((array == 0) | (array == 1)).all())


class MaskValueError(InputShapeError):
    """A mask holds values other than 0 and 1, which only ONNX Runtime gives a meaning to."""


def value_checks(graph: Graph) -> list[ValueCheck]:
    """The checks that the inputs of a native segment need before it may run."""
    makers = graph.producers()
    checks: dict[ValueCheck, None] = {}
    for node in graph.nodes:
        for check in _checks_of(node, makers, graph):
            if check.name in graph.inputs:
                checks[check] = None
    return list(checks)


def _checks_of(node: Node, makers: dict[str, Node], graph: Graph) -> list[ValueCheck]:
    if node.op == "Attention" and len(node.inputs) > 3 and node.inputs[3]:
        return [ValueCheck("mask", node.inputs[3])]
    if node.op == "MaskedMean" and len(node.inputs) > 1:
        return [ValueCheck("mask", node.inputs[1])]
    if node.op != "Embedding":
        return []
    table, ids = node.inputs[:2]
    # By type and not by array: a plan keeps its tables packed.
    shape = graph.types[table].shape
    if shape is None or not isinstance(shape[0], int):
        raise GraphError(f"Embedding {node.name!r} has a table {table!r} of unknown shape; expected a constant")
    rows = shape[0]
    maker = makers.get(ids)
    if maker is None:
        return [ValueCheck("ids", ids, rows, table=table)]
    if maker.op == "Positions":
        return [ValueCheck("columns", maker.inputs[0], rows, int(maker.attrs.get("offset", 0)), table)]
    if maker.op == "PositionsFromIds":
        return [ValueCheck("counted", maker.inputs[0], rows, int(maker.attrs.get("padding_idx", 0)), table)]
    return []


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _shape(kind: TensorType) -> str:
    return "[" + ", ".join(str(dim) for dim in kind.shape or ()) + "]"


def _hint(array: np.ndarray, kind: TensorType) -> str:
    if kind.shape is not None and array.ndim == len(kind.shape) - 1:
        return ": add the batch axis with array[None]"
    return ""
