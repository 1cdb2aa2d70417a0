"""Inputs to measure with: made up from a model's own description, or read from a file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from espalier.errors import InputError, InputNameError, InputShapeError, InputTypeError, UnsupportedModelError
from espalier.ir.graph import Graph

# Hugging Face tokenizers put padding and unknown tokens first; made-up text stays clear of them where it can.
_FIRST_WORD = 4
_UNKNOWN_LIMIT = 2


class InputInfo(Protocol):
    """An input as ONNX Runtime and :class:`espalier.Session` describe it."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """The extents, symbolic ones by name."""

    @property
    def type(self) -> str:
        """Like ``tensor(int64)``."""


@dataclass(frozen=True)
class InputLimits:
    """What the values of a model's inputs may be: by input name, ids below ``ids`` and at most ``length`` tokens."""

    ids: dict[str, int] = field(default_factory=dict)
    length: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Feeds:
    """One batch. ``padded`` are arrays by input name; ``mask`` is the attention mask among them, if there is one.

    ``samples`` is the batch size and ``tokens`` counts what is not padding, None where the inputs are not tokens.
    """

    padded: dict[str, np.ndarray]
    mask: np.ndarray | None
    samples: int
    tokens: int | None

    def sequences(self) -> list[dict[str, np.ndarray]]:
        """The batch as :meth:`espalier.Session.run_ragged` takes it: every row without its padding."""
        if self.mask is None:
            return [{name: array[row] for name, array in self.padded.items()} for row in range(self.samples)]
        kept = self.mask != 0
        return [
            {name: array[row][kept[row]] for name, array in self.padded.items() if array.shape[:2] == kept.shape}
            for row in range(self.samples)
        ]


def limits_of(graph: Graph) -> InputLimits:
    """Limits on a graph's inputs: the rows of the tables that they index, directly or through positions."""
    makers = graph.producers()
    limits = InputLimits()
    for node in graph.nodes:
        table, ids = (*node.inputs, "", "")[:2]
        if node.op not in ("Embedding", "Gather") or table not in graph.constants or not graph.constants[table].ndim:
            continue
        rows = int(graph.constants[table].shape[0])
        maker = makers.get(ids)
        while maker is not None and maker.op == "Cast" and maker.inputs[0] != ids:
            ids = maker.inputs[0]
            maker = makers.get(ids)
        if maker is not None and maker.op in ("Positions", "PositionsFromIds"):
            used = int(maker.attrs.get("offset", 0)) or int(maker.attrs.get("padding_idx", -1)) + 1
            _tighten(limits.length, maker.inputs[0], rows - used)
        elif ids in graph.inputs:
            _tighten(limits.ids, ids, rows)
    return limits


def _tighten(limits: dict[str, int], name: str, limit: int) -> None:
    limits[name] = min(limit, limits.get(name, limit))


def make_feeds(
    inputs: Sequence[InputInfo], limits: InputLimits, *, batch: int, seq: int, ragged: bool = False, seed: int = 0
) -> Feeds:
    """Random inputs: ``batch`` sequences of ``seq`` tokens, or with ``ragged`` of ``seq / 4`` to ``seq`` and padding.

    Fixed extents of the model win over ``batch`` and ``seq``. Token types are zeros, float inputs standard normal.
    Raises InputShapeError when an extent cannot be guessed or ``seq`` is beyond the model's positions, InputTypeError
    for an element type that cannot be made up, InputError for ``ragged`` without a mask.
    """
    if batch < 1 or seq < 1:
        raise InputShapeError(f"batch and seq must be at least 1; got {batch} and {seq}")
    rng = np.random.default_rng(seed)
    shapes = {info.name: _extents(info, batch, seq) for info in inputs}
    for name, longest in limits.length.items():
        if name in shapes and shapes[name][-1] > longest:
            raise InputShapeError(
                f"the model has positions for {longest} tokens; got {shapes[name][-1]}: ask for --seq {longest} or less"
            )
    mask_name = next((info.name for info in inputs if "mask" in info.name.lower() and _is_int(info)), None)
    if ragged and mask_name is None:
        raise InputError("this model has no attention mask among its inputs, so it cannot take ragged batches padded")
    mask = None
    if mask_name is not None and len(shapes[mask_name]) == 2:
        rows, columns = shapes[mask_name]
        lengths = rng.integers(max(1, columns // 4), columns + 1, rows) if ragged else np.full(rows, columns)
        lengths[0] = columns
        mask = (np.arange(columns)[None, :] < lengths[:, None]).astype(np.int64)
    padded = {info.name: _values(info, shapes[info.name], limits, mask, rng) for info in inputs}
    return _feeds(padded, padded.get(mask_name or ""), [info.name for info in inputs])


def _feeds(padded: dict[str, np.ndarray], mask: np.ndarray | None, order: Sequence[str]) -> Feeds:
    first = padded[order[0]] if order else np.zeros((1,))
    samples = int(first.shape[0]) if first.ndim else 1
    if mask is not None and mask.ndim == 2:
        return Feeds(padded, mask, samples, int((mask != 0).sum()))
    return Feeds(padded, None, samples, int(first.size) if first.ndim == 2 and first.dtype.kind in "iu" else None)


def _extents(info: InputInfo, batch: int, seq: int) -> tuple[int, ...]:
    extents: list[int] = []
    for axis, extent in enumerate(info.shape):
        symbol = "" if extent is None else str(extent).lower()
        if isinstance(extent, int):
            extents.append(extent)
        elif axis == 0 or "batch" in symbol:
            extents.append(batch)
        elif axis == 1 and (_is_int(info) or "seq" in symbol or "len" in symbol):
            extents.append(seq)
        else:
            raise InputShapeError(
                f"cannot guess extent {extent!r} of input {info.name!r} {list(info.shape)}; "
                "save inputs with numpy.savez and pass the file with --inputs"
            )
    return tuple(extents)


def _is_int(info: InputInfo) -> bool:
    return info.type in ("tensor(int64)", "tensor(int32)", "tensor(bool)")


def _values(
    info: InputInfo, shape: tuple[int, ...], limits: InputLimits, mask: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    dtype, name = dtype_of(info), info.name.lower()
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in name:
        return (mask if mask is not None and mask.shape == shape else np.ones(shape)).astype(dtype)
    if "type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    limit = limits.ids.get(info.name, _UNKNOWN_LIMIT)
    values = rng.integers(min(_FIRST_WORD, limit - 1), limit, shape)
    if mask is not None and mask.shape == shape:
        values = values * mask
    return values.astype(dtype)


def dtype_of(info: InputInfo) -> np.dtype[Any]:
    """The NumPy type of an input. Raises InputTypeError where there is none to make up values of."""
    element = info.type.removeprefix("tensor(").removesuffix(")")
    try:
        dtype = np.dtype({"float": "float32", "double": "float64"}.get(element, element))
    except TypeError:
        dtype = np.dtype("O")
    if dtype.kind not in "fiub":
        raise InputTypeError(f"cannot make up values of {info.type} for input {info.name!r}; pass --inputs FILE.npz")
    return dtype


def read_feeds(path: Path, inputs: Sequence[InputInfo]) -> Feeds:
    """The arrays of an ``.npz`` file whose keys are the names of the inputs.

    Raises InputError when the file cannot be read and InputNameError when the names are not the model's.
    """
    padded = read_arrays(path)
    expected = [info.name for info in inputs]
    if set(padded) != set(expected):
        raise InputNameError(
            f"{path} holds {sorted(padded)}; the model takes {expected}: save arrays under those names"
        )
    mask = next((array for name, array in padded.items() if "mask" in name.lower() and array.ndim == 2), None)
    return _feeds(padded, mask, expected)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` file. Raises InputError when it is not one, or holds pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path} holds a single array; expected an archive by numpy.savez(path, name=array)")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; save inputs with numpy.savez(path, name=array)") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not an .npz archive of plain arrays ({error}); write it with numpy.savez"
        ) from error


def read_texts(path: Path, model: Path, *, limit: int) -> list[list[int]]:
    """The first ``limit`` lines of a text file as token ids, by the tokenizer in the folder ``model``.

    Texts beyond the model's positions are cut. Raises DataError, ModelNotFoundError, ModelFormatError or
    MissingDependencyError.
    """
    from espalier import data
    from espalier.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    lengths = input_limits(model).length.values()
    if lengths:
        tokenizer.enable_truncation(min(lengths))
    return [encoding.ids for encoding in tokenizer.encode_batch(data.read_texts(path)[:limit])]


def input_limits(model: Path) -> InputLimits:
    """The limits of a model file or folder; none are known where ONNX Runtime alone understands it."""
    from espalier._session.source import identify

    source = identify(model)
    try:
        return _limits(source.kind, model)
    except UnsupportedModelError:
        return InputLimits()


def _limits(kind: str, model: Path) -> InputLimits:
    if kind == "plan":
        from espalier import compiler

        merged = InputLimits()
        for step in compiler.read_plan(model).steps:
            graph = getattr(step, "graph", None)
            if graph is not None:
                found = limits_of(graph)
                merged.ids.update(found.ids)
                merged.length.update(found.length)
        return merged
    if kind == "hf":
        from espalier import hf

        return limits_of(hf.read(model))
    from espalier import onnx, passes

    return limits_of(passes.run(onnx.read(model)))
