"""Tokenised samples as three arrays, which a process of another environment reads without a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from espalier.data.batching import Feature
from espalier.errors import DataError


class Samples:
    """``samples[i]`` is a feature. Stored end to end: ``ids`` int32, ``types`` int8, ``ends`` int64 ``[samples]``."""

    def __init__(self, ids: np.ndarray, types: np.ndarray, ends: np.ndarray) -> None:
        bounds = np.concatenate([[0], ends]).tolist()
        self._arrays = {"ids": ids, "types": types, "ends": ends}
        self.lengths: np.ndarray = np.diff(ends, prepend=0)
        self._features = [Feature(ids[begin:end], types[begin:end], {}) for begin, end in itertools.pairwise(bounds)]

    @staticmethod
    def of(features: Sequence[Feature]) -> Samples:
        """From features. Raises DataError when there is none."""
        if not features:
            raise DataError("the data set has no sample; expected at least one")
        return Samples(
            np.concatenate([f.ids for f in features]),
            np.concatenate([f.types for f in features]),
            np.cumsum([len(f.ids) for f in features], dtype=np.int64),
        )

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file."""
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **self._arrays)

    @staticmethod
    def load(path: Path) -> Samples:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return Samples(arrays["ids"], arrays["types"], arrays["ends"])

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, number: int) -> Feature:
        return self._features[number]
