"""Constants as a plan stores them: arrays to whoever asks for their shape, dense only to whoever insists."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.errors import EngineError, ModelFormatError

if TYPE_CHECKING:
    from espalier._native import SparseMatrix

_ESCAPE = 255


def _corrupt(what: str) -> ModelFormatError:
    return ModelFormatError(f"a sparse weight of the plan is corrupt ({what}); compile the model again")


class StoredMatrix:
    """A float32 matrix in some compact form. Behaves like a read-only array: shape, dtype, ``numpy.asarray``."""

    dtype = np.dtype(np.float32)
    ndim = 2
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Entries, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.size * 4

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._dense().astype(dtype or np.float32, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        found: np.ndarray = self._dense()[index]
        return found

    def _dense(self) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} does not say how to become dense")


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
        starts = np.asarray(matrix.starts)
        counts = np.diff(starts)
        columns = np.asarray(matrix.indices).astype(np.int32)
        before = np.empty_like(columns)
        before[1:] = columns[:-1]
        before[starts[:-1][counts > 0]] = -1
        gaps = columns - before - 1
        escapes = gaps // _ESCAPE
        stream = np.full(len(gaps) + int(escapes.sum()), _ESCAPE, np.uint8)
        stream[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
        bits = np.asarray(matrix.values).view(np.uint32)
        top = zlib.compress((bits >> 24).astype(np.uint8).tobytes(), 6)
        return cls(
            (matrix.rows, matrix.columns),
            counts.astype(np.uint32),
            stream,
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
class ScaledTable(StoredMatrix):
    """Rows of 16-bit integers with a scale each: ``integers`` int16 ``[rows, columns]``, ``scales`` float32 ``[rows]``.

    Rounding error per entry is at most half a step, max|row| / 65534.
    """

    integers: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        self.shape = (self.integers.shape[0], self.integers.shape[1])

    @classmethod
    def of(cls, table: np.ndarray) -> ScaledTable:
        """Round a float32 table, finite throughout."""
        scales = np.abs(table).max(axis=1, initial=0.0).astype(np.float32) / np.float32(32767)
        safe = np.where(scales > 0, scales, np.float32(1))
        return cls(np.clip(np.rint(table / safe[:, None]), -32767, 32767).astype(np.int16), scales)

    def _dense(self) -> np.ndarray:
        table: np.ndarray = self.integers.astype(np.float32) * self.scales[:, None]
        return table
