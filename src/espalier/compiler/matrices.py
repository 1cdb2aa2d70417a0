"""Weights as a plan stores them: by what is not zero."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from espalier.errors import EngineError, ModelFormatError
from espalier.ir.stored import StoredMatrix

if TYPE_CHECKING:
    from espalier._native import SparseMatrix

_ESCAPE = 255


def _corrupt(what: str) -> ModelFormatError:
    return ModelFormatError(f"a sparse weight of the plan is corrupt ({what}); compile the model again")


def encode_gaps(counts: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Places in a matrix, row by row and ascending, as uint8: how many are skipped before each in its row.

    ``counts`` ``[rows]``, ``columns`` ``[places]``. A 255 skips 255 and is no place itself.
    """
    columns = columns.astype(np.int32)
    before = np.empty_like(columns)
    before[1:] = columns[:-1]
    starts = np.cumsum(counts) - counts
    before[starts[counts > 0]] = -1
    gaps = columns - before - 1
    escapes = gaps // _ESCAPE
    stream = np.full(len(gaps) + int(escapes.sum()), _ESCAPE, np.uint8)
    stream[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return stream


def decode_gaps(counts: np.ndarray, gaps: np.ndarray, extent: int) -> np.ndarray:
    """The columns that :func:`encode_gaps` encoded. Raises ModelFormatError where one is not below ``extent``."""
    place = gaps != _ESCAPE
    if int(counts.sum(dtype=np.int64)) != int(place.sum()) or (len(gaps) and not place[-1]):
        raise _corrupt(f"{counts.sum(dtype=np.int64)} places are announced, {place.sum()} are there")
    ends = np.cumsum(np.where(place, gaps.astype(np.int64) + 1, _ESCAPE))[place]
    starts = np.cumsum(counts, dtype=np.int64) - counts
    bases = np.concatenate([[0], ends])[starts]
    columns: np.ndarray = ends - np.repeat(bases, counts) - 1
    if len(columns) and int(columns.max()) >= extent:
        raise _corrupt(f"a place at {columns.max()} of {extent}")
    return columns


@dataclass(eq=False)
class SparseConstant(StoredMatrix):
    """The nonzeros of a matrix, bit for bit, in about 4.3 bytes each.

    ``counts`` uint32 ``[rows]``: nonzeros per row. ``gaps`` uint8: zeros before each nonzero of its row, 255 standing
    for 255 zeros and no nonzero. A float32 is split where its bytes differ in kind: ``low`` uint16 ``[n]`` and
    ``middle`` uint8 ``[n]`` are mantissa; ``top`` uint8, sign and most of the exponent, takes few values and is
    deflated.
    """

    shape: tuple[int, int]
    counts: np.ndarray
    gaps: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    top: np.ndarray

    @classmethod
    def of(cls, matrix: SparseMatrix) -> SparseConstant:
        """Encode the nonzeros of ``matrix``."""
        counts = np.diff(np.asarray(matrix.starts))
        bits = np.asarray(matrix.values).view(np.uint32)
        top = zlib.compress((bits >> 24).astype(np.uint8).tobytes(), 6)
        return cls(
            (matrix.rows, matrix.columns),
            counts.astype(np.uint32),
            encode_gaps(counts, np.asarray(matrix.indices)),
            (bits & 0xFFFF).astype(np.uint16),
            ((bits >> 16) & 0xFF).astype(np.uint8),
            np.frombuffer(top, np.uint8),
        )

    @property
    def nonzeros(self) -> int:
        """Entries that are not zero."""
        return len(self.low)

    def matrix(self) -> SparseMatrix:
        """For the engine. Raises ModelFormatError when the parts contradict each other."""
        from espalier import _native

        inflate = zlib.decompressobj()
        try:
            top = inflate.decompress(self.top.tobytes(), max(1, self.nonzeros))
        except zlib.error as error:
            raise _corrupt(str(error)) from error
        if len(top) != self.nonzeros or len(self.middle) != self.nonzeros:
            raise _corrupt(f"{self.nonzeros} nonzeros, {len(top)} exponents, {len(self.middle)} mantissas")
        try:
            return _native.SparseMatrix.decode(
                *self.shape, self.counts, self.gaps, self.low, self.middle, np.frombuffer(top, np.uint8)
            )
        except EngineError as error:
            raise _corrupt(str(error)) from error

    def _dense(self) -> np.ndarray:
        matrix = self.matrix()
        out = np.zeros(self.shape, np.float32)
        out[np.repeat(np.arange(self.shape[0]), self.counts), matrix.indices] = matrix.values
        return out


@dataclass(eq=False)
class SparseIntegers(StoredMatrix):
    """A matrix of 8 bit integers by what differs from each row's ``zero``, in runs of 1 or 4 columns.

    ``counts`` uint32 ``[rows]``: runs per row; ``gaps`` uint8: runs skipped before each, by :func:`encode_gaps`;
    ``values`` int8 or uint8 ``[runs, 1 or 4]``; ``zero`` like ``values``, ``[rows]`` or ``[1]``.
    """

    shape: tuple[int, int]
    counts: np.ndarray
    gaps: np.ndarray
    values: np.ndarray
    zero: np.ndarray

    def __post_init__(self) -> None:
        self.dtype = self.values.dtype

    @classmethod
    def of(cls, q: np.ndarray, zero: np.ndarray | None) -> SparseIntegers | None:
        """The shortest form of ``q``, whose zero points are ``zero`` (0 for None); None when nothing is saved."""
        zero = np.zeros(1, q.dtype) if zero is None else np.asarray(zero).reshape(-1)
        forms = [cls._in_runs(q, zero, width) for width in (1, 4) if q.shape[1] % width == 0]
        best = min(forms, key=lambda form: form.stored_bytes)
        return best if best.stored_bytes < q.nbytes else None

    @classmethod
    def _in_runs(cls, q: np.ndarray, zero: np.ndarray, width: int) -> SparseIntegers:
        runs = q.reshape(q.shape[0], -1, width)
        rows, columns = np.nonzero((runs != zero.reshape(-1, 1, 1)).any(axis=2))
        counts = np.bincount(rows, minlength=q.shape[0]).astype(np.uint32)
        return cls((q.shape[0], q.shape[1]), counts, encode_gaps(counts, columns), runs[rows, columns], zero)

    @property
    def stored_bytes(self) -> int:
        """What it takes on disk."""
        return sum(part.nbytes for part in (self.counts, self.gaps, self.values, self.zero))

    def _dense(self) -> np.ndarray:
        width = self.values.shape[1]
        columns = decode_gaps(self.counts, self.gaps, self.shape[1] // width)
        out = np.empty((self.shape[0], self.shape[1] // width, width), self.dtype)
        out[:] = self.zero.reshape(-1, 1, 1)
        out[np.repeat(np.arange(self.shape[0]), self.counts), columns] = self.values
        return out.reshape(self.shape)
