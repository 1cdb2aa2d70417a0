"""Ragged batches: hardly any padding, every row once, and the same order from the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.data import Feature, collate, epoch_order, fixed_order, padding_share
from espalier.errors import DataError


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 60, 2000)


def test_every_row_once_within_the_budget(lengths: np.ndarray) -> None:
    batches = epoch_order(lengths, 512, seed=3, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(len(rows) * lengths[rows].max() for rows in batches) <= 512
    assert padding_share(lengths, batches) < 0.02


def test_order_depends_on_seed_and_epoch_alone(lengths: np.ndarray) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [rows.tolist() for rows in epoch_order(lengths, 512, seed=seed, epoch=epoch)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert len(order(0, 1)) == len(order(5, 9))  # so that epochs have equally many steps


def test_a_sequence_beyond_the_budget_is_alone() -> None:
    batches = fixed_order(np.array([3, 900, 3]), 64)
    assert [rows.tolist() for rows in batches] == [[0, 2], [1]]


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no training example"):
        epoch_order(np.zeros(0, np.int64), 64, seed=0, epoch=0)


def test_collate() -> None:
    def feature(n: int) -> Feature:
        return Feature(np.arange(1, n + 1, dtype=np.int32), np.ones(n, np.int8), {"label": n, "tags": np.full(n, n)})

    batch = collate([feature(2), feature(9), feature(3)], np.array([2, 0]), padding_id=7)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [1, 2, 7]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets["label"].tolist() == [3, 2]
    assert batch.targets["tags"].tolist() == [[3, 3, 3], [2, 2, -100]]
    assert batch.tokens == 5
