"""Ragged batches: sequences of like length together, as many as a budget of tokens allows.

Sorting by length leaves next to no padding. Ties are broken at random and the batches come in random order, both from
(seed, epoch) alone, so that a run which stops can go on at any position. The lengths in sorted order are the same in
every epoch, hence so are the number of batches and their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Feature:
    """One sequence: ``ids`` int32 ``[tokens]``, ``types`` int8 ``[tokens]``.

    ``target``: values by name; a number for the sequence, or an array ``[tokens]`` with a number for each token.
    """

    ids: np.ndarray
    types: np.ndarray
    target: Mapping[str, int | float | np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Sequences padded to the longest: ``inputs`` are tensors ``[sequences, tokens]`` by the model's names.

    ``rows`` are the sequences' places in the data, ``tokens`` counts them without padding.
    """

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    rows: np.ndarray
    tokens: int

    @property
    def mask(self) -> torch.Tensor:
        """int64 ``[sequences, tokens]``: 1 for a token, 0 for padding."""
        return self.inputs["attention_mask"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        if device.type == "cpu":
            return self
        moved = [
            {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
            for tensors in (self.inputs, self.targets)
        ]
        return replace(self, inputs=moved[0], targets=moved[1])


def cut(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut ``order`` (rows by growing length) into batches of at most ``budget`` tokens, padding counted.

    A sequence longer than the budget is a batch of its own.
    """
    batches: list[np.ndarray] = []
    start = 0
    sizes = lengths[order]
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(sizes[end]) <= budget:
            end += 1
        batches.append(order[start:end])
        start = end
    return batches


def epoch_order(lengths: np.ndarray, budget: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch: arrays of rows. Raises DataError when there is no row."""
    if len(lengths) == 0:
        raise DataError("there is no training example; give at least one")
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    batches = cut(lengths, order, budget)
    return [batches[i] for i in rng.permutation(len(batches))]


def fixed_order(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Batches in one order that depends on the lengths alone, for evaluation and for the teacher's outputs."""
    return cut(lengths, np.argsort(lengths, kind="stable"), budget)


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Padding as a share of all token places in these batches."""
    places = sum(int(lengths[rows].max()) * len(rows) for rows in batches)
    return 1 - int(sum(int(lengths[rows].sum()) for rows in batches)) / places if places else 0.0


def collate(features: Sequence[Feature], rows: np.ndarray, *, padding_id: int = 0, ignored: int = -100) -> Batch:
    """Pad the features at ``rows`` to one length. Targets per token are padded with ``ignored``."""
    import torch

    chosen = [features[row] for row in rows]
    lengths = [len(feature.ids) for feature in chosen]
    shape = (len(chosen), max(lengths))
    ids = np.full(shape, padding_id, np.int64)
    types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, (feature, length) in enumerate(zip(chosen, lengths, strict=True)):
        ids[i, :length], types[i, :length], mask[i, :length] = feature.ids, feature.types, 1
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    targets: dict[str, Any] = {}
    for name, first in chosen[0].target.items():
        if isinstance(first, np.ndarray):
            padded = np.full(shape, ignored, first.dtype)
            for i, feature in enumerate(chosen):
                values = np.asarray(feature.target[name])
                padded[i, : len(values)] = values
            targets[name] = padded
        else:
            targets[name] = np.array([feature.target[name] for feature in chosen])
    return Batch(
        {name: torch.from_numpy(array) for name, array in inputs.items()},
        {name: torch.from_numpy(array) for name, array in targets.items()},
        rows,
        sum(lengths),
    )
