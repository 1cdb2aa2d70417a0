"""The host's side of a compiled segment: padded or ragged tensors in and out, packed tokens in between.

What computes on the packed tokens (the native engine, a GPU) derives from :class:`PackedProgram`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from espalier.compiler.plumbing import Output, Plumbing
from espalier.ir.graph import Graph


@dataclass
class Packing:
    """Which tokens of a padded batch run. ``kept`` is None when all do."""

    lengths: np.ndarray
    starts: np.ndarray
    kept: np.ndarray | None
    key_bias: np.ndarray | None
    token_weights: np.ndarray | None


@dataclass
class PackedBatch:
    """One batch as a backend takes it: the tokens of all sequences end to end.

    ``lengths``, ``starts`` int32 ``[B]``: tokens of each sequence, and the padded column of its first. ``widths`` int32
    ``[B]``: columns of each row as it was given; ``columns``: the most of them. ``indices`` int32 ``[T]`` each;
    ``floats`` float32 ``[T, F]``, ``[B, F]`` or (images) ``[B * F, pixels]`` each; ``biases`` in the backend's layout.
    ``key_bias``, ``token_weights`` float32 ``[T]``: None when nothing is masked, or all weigh 1.
    """

    lengths: np.ndarray
    starts: np.ndarray
    widths: np.ndarray
    columns: int
    indices: list[np.ndarray]
    floats: list[np.ndarray]
    biases: list[np.ndarray]
    key_bias: np.ndarray | None
    token_weights: np.ndarray | None

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class OpTime:
    """Seconds per run in one operation, summed over threads, and its share of the whole."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Accelerator:
    """A device that computes instead of the CPU: its maker's name for it, and its memory in bytes."""

    name: str
    memory: int


class LayerInfo(Protocol):
    """An operation, for the report."""

    @property
    def name(self) -> str:
        """As in the model."""

    @property
    def op(self) -> str:
        """As in the dialect."""

    @property
    def type(self) -> str:
        """The element type of the products."""

    @property
    def format(self) -> str:
        """How the weight is kept; "" without one."""

    @property
    def sparsity(self) -> float | None:
        """None without a weight."""

    @property
    def why(self) -> str:
        """What it does not do that one might expect."""


class PackedProgram(ABC):
    """A compiled native graph: what every backend does the same way. Safe to call from several threads at once.

    ``where``: the backend's name in reports. ``accelerator``: what it runs on, None for the CPU.
    """

    where: str
    accelerator: Accelerator | None = None
    _plumbing: Plumbing
    _tokens_from: str
    """A graph input of shape ``[batch, seq, ...]`` to read the extents from; "" for whole sequences only."""

    @abstractmethod
    def _launch(self, batch: PackedBatch) -> list[np.ndarray]:
        """Compute every store of a batch of at least one token: float32 ``[T or B, width]``, by store number."""

    @abstractmethod
    def layers(self) -> Sequence[LayerInfo]:
        """What there is to say about operations, those with weights at least."""

    @abstractmethod
    def profile(self) -> list[OpTime]:
        """Time by operation, averaged over the runs so far; nothing where times are not taken."""

    def warm_up(self, lengths: Sequence[int], *, tokens: int | None = None) -> float:
        """Do what the first batches would otherwise pay for, and return the seconds it took.

        ``lengths``: some of the sequences to come, in tokens; ``tokens``: of the largest batch, None for the backend's
        own limit.
        """
        return 0.0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for padded inputs by name. Rows at padding positions of token outputs are zero.

        Raises InputShapeError for a bias that does not fit, EngineError for an index outside its table.
        """
        batch, seq = self._extents(feeds)
        packing = self._pack(feeds, batch, seq)
        found = self._execute(feeds, packing, np.full(batch, seq, np.int32), seq)
        return {o.name: self._padded(o, found[o.number], packing, batch, seq) for o in self._plumbing.outputs}

    def run_ragged(self, feeds: Mapping[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
        """One array per sequence and input, without the batch axis; the same per output. Padding is never computed."""
        if not self._tokens_from:
            stacked = {name: np.stack(rows) for name, rows in feeds.items()}
            return {name: list(array) for name, array in self.run(stacked).items()}
        own = np.array([len(row) for row in feeds[self._tokens_from]], np.int32)
        batch, seq = len(own), int(own.max(initial=0))
        padded = {name: _pad(rows, own, seq) for name, rows in feeds.items()}
        packing = self._pack(padded, batch, seq, own)
        found = self._execute(padded, packing, own, seq)
        return {o.name: self._split(o, found[o.number], packing, own, seq) for o in self._plumbing.outputs}

    def pack_ragged(self, feeds: Mapping[str, list[np.ndarray]]) -> PackedBatch:
        """What :meth:`run_ragged` computes on, for measurements below it. Some input must hold tokens."""
        own = np.array([len(row) for row in feeds[self._tokens_from]], np.int32)
        seq = int(own.max())
        padded = {name: _pad(rows, own, seq) for name, rows in feeds.items()}
        return self._batch(padded, self._pack(padded, len(own), seq, own), own, seq)

    def _extents(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, int]:
        if self._tokens_from:
            shape = feeds[self._tokens_from].shape
            return int(shape[0]), int(shape[1])
        return int(feeds[self._plumbing.floats[0][0]].shape[0]), 1

    def _pack(self, feeds: Mapping[str, np.ndarray], batch: int, seq: int, own: np.ndarray | None = None) -> Packing:
        """Which tokens run. ``own``: the true length of each row when the padding is ours."""
        plumbing = self._plumbing
        columns = np.arange(seq)
        lengths = np.full(batch, seq, np.int32) if own is None else own
        starts = np.zeros(batch, np.int32)
        mask = feeds[plumbing.key_mask] != 0 if plumbing.key_mask else None
        if plumbing.may_unpad and mask is not None and batch and seq:
            first = mask.argmax(axis=1)
            last = seq - 1 - mask[:, ::-1].argmax(axis=1)
            count = mask.sum(axis=1)
            simple = (count > 0) & (last - first + 1 == count)
            for column in plumbing.columns:
                at = column + (lengths if own is not None else seq) if column < 0 else column
                simple &= (first <= at) & (at <= last)
            lengths = np.where(simple, count, lengths).astype(np.int32)
            starts = np.where(simple, first, 0).astype(np.int32)
        kept = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
        everything = bool(kept.all())
        selected: Any = ... if everything else kept
        key_bias = None
        if mask is not None and not mask[selected].all():
            key_bias = np.where(mask[selected], np.float32(0), np.float32(plumbing.mask_value)).reshape(-1)
        token_weights = None
        if plumbing.mean_mask:
            weights = feeds[plumbing.mean_mask][selected].reshape(-1)
            if not (weights == 1).all():
                token_weights = weights.astype(np.float32)
        return Packing(lengths, starts, None if everything else kept, key_bias, token_weights)

    def _execute(
        self, feeds: Mapping[str, np.ndarray], packing: Packing, widths: np.ndarray, seq: int
    ) -> list[np.ndarray]:
        batch = len(widths)
        if batch == 0 or seq == 0:
            ordered = sorted(self._plumbing.outputs, key=lambda output: output.number)
            return [np.empty(o.extents(0, batch), np.float32) for o in ordered]
        return self._launch(self._batch(feeds, packing, widths, seq))

    def _batch(self, feeds: Mapping[str, np.ndarray], packing: Packing, widths: np.ndarray, seq: int) -> PackedBatch:
        plumbing, batch = self._plumbing, len(widths)
        tokens = int(packing.lengths.sum())
        given = dict(feeds)

        def packed(array: np.ndarray, trailing: tuple[int, ...], dtype: Any) -> np.ndarray:
            full = np.broadcast_to(array, (batch, seq, *trailing))
            chosen = full.reshape(tokens, *trailing) if packing.kept is None else full[packing.kept]
            return np.ascontiguousarray(chosen, dtype)

        return PackedBatch(
            packing.lengths,
            packing.starts,
            widths,
            seq,
            [packed(function(given, batch, seq), (), np.int32) for function in plumbing.indices],
            [
                packed(given[name], given[name].shape[2:], np.float32)
                if domain == "token"
                else _rows(given[name], domain)
                for name, domain in plumbing.floats
            ],
            [function(given, batch, seq) for function in plumbing.biases],
            packing.key_bias,
            packing.token_weights,
        )

    def _padded(self, output: Output, found: np.ndarray, packing: Packing, batch: int, seq: int) -> np.ndarray:
        if output.domain == "image":
            within = (output.pixels, output.width) if output.grid is None else (output.width, *output.grid)
            found = found.reshape(batch, *within)
        if output.domain == "token":
            if packing.kept is None:
                found = found.reshape(batch, seq, output.width)
            else:
                scattered = np.zeros((batch, seq, output.width), np.float32)
                scattered[packing.kept] = found
                found = scattered
        return _finish(output, found)

    def _split(
        self, output: Output, found: np.ndarray, packing: Packing, own: np.ndarray, seq: int
    ) -> list[np.ndarray]:
        if output.domain != "token":
            return list(self._padded(output, found, packing, len(own), seq))
        if (packing.lengths == own).all():
            return [_finish(output, part) for part in np.split(found, np.cumsum(own)[:-1])] if len(own) else []
        padded = self._padded(output, found, packing, len(own), seq)
        return [row[:length] for row, length in zip(padded, own, strict=True)]


def _rows(array: np.ndarray, domain: str) -> np.ndarray:
    """A float input of whole sequences as the matrix that a backend takes: planes are rows of pixels."""
    rows = array.reshape(array.shape[0] * array.shape[1], -1) if domain == "image" else array
    return np.ascontiguousarray(rows, np.float32)


def _finish(output: Output, array: np.ndarray) -> np.ndarray:
    if output.squeeze:
        array = array[..., 0]
    return array if output.dtype == "float32" else array.astype(output.dtype)


def _pad(rows: list[np.ndarray], own: np.ndarray, seq: int) -> np.ndarray:
    """Rows of one value per token side by side, zeros after each. Other rows (one tensor per sequence) are stacked."""
    first = np.asarray(rows[0]) if rows else np.zeros(0, np.int64)
    if any(len(row) != length for row, length in zip(rows, own, strict=True)):
        return np.stack(rows)
    out = np.zeros((len(rows), seq, *first.shape[1:]), first.dtype)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def token_input(graph: Graph, plumbing: Plumbing) -> str:
    """A graph input of shape ``[batch, seq, ...]`` to read the extents from; "" when there are only whole sequences."""
    tokens = [name for name in graph.inputs if _holds_tokens(graph, plumbing, name)]
    # A batch of 1 may be a table of positions, to be broadcast over the batch.
    batched = [name for name in tokens if (graph.types[name].shape or (1,))[0] != 1]
    return (batched or tokens or [""])[0]


def _holds_tokens(graph: Graph, plumbing: Plumbing, name: str) -> bool:
    known = graph.types[name]
    if known.dtype in ("float32", "float16", "float64"):
        return (name, "token") in plumbing.floats
    return known.shape is not None and len(known.shape) == 2
