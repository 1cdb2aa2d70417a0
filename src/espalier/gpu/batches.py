"""What a packed batch looks like on a device: bucketed extents, one buffer for all of it, and the tiles of attention.

Pure logic over NumPy and plain numbers, but for :class:`DeviceBatch`, which holds views of a device's buffer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.compiler.packed import PackedBatch

if TYPE_CHECKING:
    import torch

TILE = 64
"""Queries per program of the attention kernel."""

_STEP = 64
"""The finest step of token buckets: a multiple of every alignment that a matrix product asks for."""

_SHORT = 128
"""The lowest bound on a sequence's tokens that attention kernels of fixed grids are launched for; then times 4."""

_ORDERS = 4
"""Random orders of the lengths that a warm-up tries for each bucket."""


def bucket(count: int, step: int) -> int:
    """``count`` rounded up to the next of ``step, 2 step, ... 8 step``, then of eighths of powers of two.

    At most an eighth of a bucket beyond eight steps is empty, and a doubling takes eight buckets.
    """
    size = step
    while count > 8 * size:
        size *= 2
    return max(1, -(-count // size)) * size


@dataclass(frozen=True)
class Shape:
    """What a captured graph depends on: extents by bucket, and whether keys are masked or tokens weighted.

    ``longest`` is the bound on a sequence's tokens that attention kernels of fixed grids are launched for.
    """

    tokens: int
    sequences: int
    longest: int
    masked: bool
    weighted: bool

    @property
    def tiles(self) -> int:
        """Rows of the table of tiles: each sequence may leave its last tile unfilled, and so may the empty rest."""
        return self.tokens // TILE + self.sequences + 1


def shape_of(batch: PackedBatch) -> Shape:
    """The bucket of a batch: fine in tokens, which cost time, and coarse in the rest, so that graphs stay few."""
    tokens = bucket(batch.tokens, _STEP)
    count = len(batch.lengths)
    sequences = next(room for room in (tokens // 128, tokens // 32, tokens // 8, tokens) if room >= count)
    longest = _SHORT
    while longest < int(batch.lengths.max()):
        longest *= 4
    return Shape(tokens, sequences, longest, batch.key_bias is not None, batch.token_weights is not None)


def buckets_up_to(tokens: int) -> list[int]:
    """Every token bucket that batches of up to ``tokens`` tokens fall into."""
    found = [_STEP]
    while found[-1] < tokens:
        found.append(bucket(found[-1] + 1, _STEP))
    return found


def mixtures(lengths: Sequence[int], tokens: int, *, least: int = 1) -> list[list[int]]:
    """Ways in which ``tokens`` tokens come as sequences of these ``lengths``: all alike, and in random order.

    The last sequence of each takes the rest. None is shorter than ``least`` tokens; nothing where that cannot be.
    """
    known = sorted(length for length in lengths if length >= least)
    if not known or tokens < least:
        return []
    orders = [[known[round(share * (len(known) - 1))]] for share in (0, 0.5, 1)]
    generator = random.Random(0)
    orders += [generator.sample(known, len(known)) for _ in range(_ORDERS)]
    return [_filled(order, tokens, least) for order in orders]


def _filled(order: Sequence[int], tokens: int, least: int) -> list[int]:
    found: list[int] = []
    rest = tokens
    for length in itertools.cycle(order):
        if rest < max(length, least):
            break
        found.append(length)
        rest -= length
    if rest >= least or not found:
        return [*found, rest]
    found[-1] += rest
    return found


def tiles_of(lengths: np.ndarray, count: int) -> np.ndarray:
    """Tiles of at most :data:`TILE` queries: int32 ``[count, 2]`` of sequence and first query.

    Long sequences come first, so that their programs do not start last. The other tiles have sequence -1 and cover the
    rows behind the last sequence, one tile after another.
    """
    per_sequence = -(-lengths // TILE)
    order = np.argsort(-lengths, kind="stable")
    per_ordered = per_sequence[order]
    sequence = np.repeat(order, per_ordered)
    before = np.repeat(np.cumsum(per_ordered) - per_ordered, per_ordered)
    used = len(sequence)
    tiles = np.full((count, 2), -1, np.int32)
    tiles[:used, 0] = sequence
    tiles[:used, 1] = (np.arange(used) - before) * TILE
    tiles[used:, 1] = int(lengths.sum()) + np.arange(count - used) * TILE
    return tiles


@dataclass(frozen=True)
class Field:
    """A part of the buffer: where it begins, in elements of four bytes, its extents and type."""

    first: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))


class Layout:
    """Where the parts of a batch of some shape lie in one buffer of 32-bit elements, so that one copy moves them all.

    ``columns``: those that SelectToken reads. ``floats``: domain and features of each float input.
    """

    def __init__(
        self, shape: Shape, *, columns: Sequence[int], indices: int, floats: Sequence[tuple[str, int]]
    ) -> None:
        self.shape = shape
        self.columns = tuple(columns)
        self.fields: dict[str, Field] = {}
        self.size = 0
        self._add("bounds", (shape.sequences + 1,), "int32")
        self._add("starts", (shape.sequences,), "int32")
        self._add("tiles", (shape.tiles, 2), "int32")
        for column in self.columns:
            self._add(f"pick {column}", (shape.sequences,), "int32")
        for number in range(indices):
            self._add(f"index {number}", (shape.tokens,), "int32")
        if shape.masked:
            self._add("key bias", (shape.tokens,), "float32")
        if shape.weighted:
            self._add("weights", (shape.tokens,), "float32")
        for number, (domain, features) in enumerate(floats):
            rows = shape.tokens if domain == "token" else shape.sequences
            self._add(f"float {number}", (rows, features), "float32")

    def _add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.fields[name] = Field(self.size, shape, dtype)
        # Every part begins at 16 bytes, which vector loads need.
        self.size += -(-self.fields[name].size // 4) * 4

    def view(self, buffer: np.ndarray, name: str) -> np.ndarray:
        """One part of an int32 ``buffer``, in its own type."""
        field = self.fields[name]
        return buffer[field.first : field.first + field.size].view(field.dtype).reshape(field.shape)

    def fill(self, buffer: np.ndarray, batch: PackedBatch) -> None:
        """Write ``batch`` into an int32 ``buffer``. What the bucket has beyond it is harmless: token 0, no sequence."""
        sequences, tokens = len(batch.lengths), batch.tokens
        bounds = self.view(buffer, "bounds")
        bounds[0] = 0
        bounds[1 : sequences + 1] = np.cumsum(batch.lengths)
        bounds[sequences + 1 :] = tokens
        self._put(buffer, "starts", batch.starts)
        self.view(buffer, "tiles")[:] = tiles_of(batch.lengths, self.shape.tiles)
        for column in self.columns:
            self._put(buffer, f"pick {column}", bounds[:sequences] + places_of(batch, column))
        for number, index in enumerate(batch.indices):
            self._put(buffer, f"index {number}", index)
        if batch.key_bias is not None:
            self._put(buffer, "key bias", batch.key_bias)
        if batch.token_weights is not None:
            self._put(buffer, "weights", batch.token_weights)
        for number, array in enumerate(batch.floats):
            self._put(buffer, f"float {number}", array)

    def _put(self, buffer: np.ndarray, name: str, array: np.ndarray) -> None:
        part = self.view(buffer, name)
        part[: len(array)] = array
        part[len(array) :] = 0


@dataclass
class DeviceBatch:
    """A batch on a device; tensors are views of its buffer, but for ``biases``.

    ``bounds`` int32 ``[B + 1]``, ``starts`` int32 ``[B]``, ``tiles`` int32 ``[N, 2]``;
    ``picks``: rows ``[B]`` by column; ``indices`` int32 ``[T]``; ``floats`` float32 ``[T or B, F]``;
    ``key_bias``, ``weights`` float32 ``[T]`` or None.
    """

    shape: Shape
    bounds: torch.Tensor
    starts: torch.Tensor
    tiles: torch.Tensor
    picks: dict[int, torch.Tensor]
    indices: list[torch.Tensor]
    floats: list[torch.Tensor]
    key_bias: torch.Tensor | None
    weights: torch.Tensor | None
    biases: list[torch.Tensor]

    @classmethod
    def of(cls, layout: Layout, buffer: Any, biases: Sequence[Any] = ()) -> DeviceBatch:
        """The parts of a device's int32 ``buffer``."""
        import torch

        parts = {
            name: buffer[field.first : field.first + field.size].view(getattr(torch, field.dtype)).view(field.shape)
            for name, field in layout.fields.items()
        }
        count = {kind: sum(name.startswith(kind) for name in parts) for kind in ("index", "float")}
        return cls(
            layout.shape,
            parts["bounds"],
            parts["starts"],
            parts["tiles"],
            {column: parts[f"pick {column}"] for column in layout.columns},
            [parts[f"index {number}"] for number in range(count["index"])],
            [parts[f"float {number}"] for number in range(count["float"])],
            parts.get("key bias"),
            parts.get("weights"),
            list(biases),
        )


def places_of(batch: PackedBatch, column: int) -> np.ndarray:
    """Where a padded column is in each sequence; from the end of each row where it is negative."""
    places: np.ndarray = (column + batch.widths if column < 0 else column) - batch.starts
    return places


def split(lengths: Sequence[int], *, tokens: int, sequences: int) -> list[np.ndarray]:
    """Sequences in batches of at most ``tokens`` and ``sequences``, those of like length together, longest first.

    Gives the indices of each batch; a sequence longer than ``tokens`` has a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches: list[list[int]] = []
    room = 0
    for index in order:
        length = int(lengths[index])
        if not batches or length > room or len(batches[-1]) == sequences:
            batches.append([])
            room = tokens
        batches[-1].append(int(index))
        room -= length
    return [np.array(batch) for batch in batches]


def take(batch: PackedBatch, sequences: np.ndarray, domains: Sequence[str]) -> tuple[PackedBatch, np.ndarray]:
    """The batch of some of a batch's sequences, and the rows of their tokens in it. Biases per sequence follow.

    ``domains``: of each float input.
    """
    ends = np.cumsum(batch.lengths)
    rows = np.concatenate([np.arange(ends[s] - batch.lengths[s], ends[s]) for s in sequences])
    part = PackedBatch(
        batch.lengths[sequences],
        batch.starts[sequences],
        batch.widths[sequences],
        batch.columns,
        [index[rows] for index in batch.indices],
        [a[rows if domain == "token" else sequences] for a, domain in zip(batch.floats, domains, strict=True)],
        [bias[sequences] if len(bias) > 1 else bias for bias in batch.biases],
        None if batch.key_bias is None else batch.key_bias[rows],
        None if batch.token_weights is None else batch.token_weights[rows],
    )
    return part, rows
