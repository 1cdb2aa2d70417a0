"""Sequences of different lengths in, one result per sequence out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier._session.checks import check_names, suggest
from espalier._session.describe import TensorInfo
from espalier.errors import InputNameError, InputShapeError, InputTypeError, UnsupportedModelError

_IDS = ("input_ids", "ids", "tokens")
_ONES = frozenset({"attention_mask", "input_mask", "mask"})
_ZEROS = frozenset({"token_type_ids", "segment_ids"})

Row = dict[str, np.ndarray]
Run = Callable[[Sequence[str], Mapping[str, np.ndarray]], list[Any]]


def feeds_of(sequences: Any, infos: Sequence[TensorInfo]) -> list[Row]:
    """One dict of input name to array, batch axis dropped, per sequence; masks and token types filled in.

    Raises InputNameError, InputTypeError or InputShapeError.
    """
    if isinstance(sequences, (str, bytes, Mapping)) or not hasattr(sequences, "__len__"):
        raise InputTypeError(
            f"sequences must be a list of token id sequences or of dicts; got {type(sequences).__name__}: "
            "wrap one sequence in a list"
        )
    return [_row(sequence, index, infos) for index, sequence in enumerate(sequences)]


def _row(sequence: Any, index: int, infos: Sequence[TensorInfo]) -> Row:
    given = sequence if isinstance(sequence, Mapping) else {_ids_input(infos): sequence}
    expected = [info.name for info in infos]
    for name in given:
        if name not in expected:
            raise InputNameError(
                f"sequence {index}: the model has no input {name!r}; it takes {expected}{suggest(name, expected)}"
            )
    row = {info.name: _array(given[info.name], index, info) for info in infos if info.name in given}
    if not row:
        raise InputNameError(f"sequence {index} is an empty dict; expected {expected[0]!r} at least")
    length = len(next(iter(row.values())))
    for info in infos:
        if info.name not in row and info.name in _ONES | _ZEROS:
            row[info.name] = np.full(length, int(info.name in _ONES), _dtype(info))
    check_names(row, expected)
    for name, array in row.items():
        if len(array) != length:
            raise InputShapeError(
                f"sequence {index}: {name!r} has {len(array)} values but {next(iter(row))!r} has {length}; "
                "give every input of a sequence one value per token"
            )
    if length == 0:
        raise InputShapeError(f"sequence {index} is empty; give every sequence at least one token")
    return row


def _ids_input(infos: Sequence[TensorInfo]) -> str:
    names = [info.name for info in infos]
    for name in _IDS:
        if name in names:
            return name
    open_names = [name for name in names if name not in _ONES | _ZEROS]
    if len(open_names) == 1:
        return open_names[0]
    raise InputNameError(f"cannot tell which of {names} takes the token ids; pass dicts of input name to array")


def _array(value: Any, index: int, info: TensorInfo) -> np.ndarray:
    dtype = _dtype(info)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputShapeError(f"sequence {index}: {info.name!r} is not a flat list of numbers: {error}") from error
    rank = max(1, len(info.shape) - 1)
    if array.ndim != rank:
        raise InputShapeError(
            f"sequence {index}: {info.name!r} must have {rank} dimension(s), without a batch axis; "
            f"got shape {array.shape}"
        )
    if array.size == 0:
        return array.astype(dtype)
    if dtype.kind in "iu" and array.dtype.kind in "iub":
        return array.astype(dtype, copy=False)
    if array.dtype != dtype:
        raise InputTypeError(f"sequence {index}: {info.name!r} must be {dtype.name}; got {array.dtype.name}")
    return array


def _dtype(info: TensorInfo) -> np.dtype[Any]:
    element = info.type.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64", "bool": "bool"}.get(element, element))
    except TypeError as error:
        raise UnsupportedModelError(
            f"input {info.name!r} is {info.type}, and sequences are made of tensors only; use run"
        ) from error


def by_length(
    run: Run, outputs: Sequence[str], rows: Sequence[Row], inputs: Sequence[TensorInfo], results: Sequence[TensorInfo]
) -> list[list[np.ndarray]]:
    """Run sequences of equal length together: exact whatever the model does with padding, because there is none.

    Raises UnsupportedModelError when an output has no batch axis to take a sequence's result from.
    """
    shapes = {info.name: info.shape for info in results}
    # An extent that the model fixes is no batch axis, and a batch it fixes to one takes one sequence at a time.
    alone = any(info.shape and isinstance(info.shape[0], int) for info in inputs) or any(
        not shapes[name] or isinstance(shapes[name][0], int) for name in outputs
    )
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(index if alone else row[inputs[0].name].shape, []).append(index)
    found: list[list[Any]] = [[None] * len(rows) for _ in outputs]
    for members in groups.values():
        feeds = {info.name: np.stack([rows[index][info.name] for index in members]) for info in inputs}
        for place, (name, array) in enumerate(zip(outputs, run(outputs, feeds), strict=True)):
            if not isinstance(array, np.ndarray) or array.ndim == 0 or array.shape[0] != len(members):
                shape = getattr(array, "shape", type(array).__name__)
                raise UnsupportedModelError(
                    f"output {name!r} has no batch axis (shape {shape} for {len(members)} sequences); use run instead"
                )
            for position, index in enumerate(members):
                found[place][index] = array[position]
    return found
