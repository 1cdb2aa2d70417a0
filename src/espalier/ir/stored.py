"""Constants in a compact form: arrays to whoever asks for their shape, dense only to whoever insists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


class StoredMatrix:
    """A matrix in some compact form. Behaves like a read-only array: shape, dtype, ``numpy.asarray``."""

    dtype: np.dtype[Any] = np.dtype(np.float32)
    ndim = 2
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Entries, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._dense().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        found: np.ndarray = self._dense()[index]
        return found

    def _dense(self) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} does not say how to become dense")


@dataclass(eq=False)
class ScaledTable(StoredMatrix):
    """Integers with a scale per row: ``integers`` int8 or int16 ``[rows, columns]``, ``scales`` float32 ``[rows]``.

    Holds a quantised table exactly, and any other to within half a step per entry, max|row| / 65534.
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

    @classmethod
    def dequantized(cls, q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> ScaledTable:
        """``(q - zero) * scale`` of 8 bit integers; ``scale`` and ``zero`` are numbers or vectors over the rows."""
        centred = q.astype(np.int16) - zero.astype(np.int16).reshape(-1, 1)
        limits = np.iinfo(np.int8)
        narrow = limits.min <= centred.min(initial=0) and centred.max(initial=0) <= limits.max
        scales = np.broadcast_to(scale.astype(np.float32).reshape(-1), len(q))
        return cls(centred.astype(np.int8) if narrow else centred, scales)

    def _dense(self) -> np.ndarray:
        table: np.ndarray = self.integers.astype(np.float32) * self.scales[:, None]
        return table
