"""How a target is spread over layers, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from espalier.compression.allocation import cheapest, global_counts
from espalier.errors import ConfigError


def test_one_threshold_takes_the_lowest_of_all_layers() -> None:
    rng = np.random.default_rng(0)
    scores = {"a": rng.random(40), "b": 3 * rng.random(60)}
    counts = global_counts(scores, {"a": 1, "b": 1}, 50, {"a": 40, "b": 60})
    threshold = np.sort(np.concatenate(list(scores.values())))[49]
    assert counts == {name: int((values <= threshold).sum()) for name, values in scores.items()}


def test_groups_of_different_sizes_compete_by_score_per_weight() -> None:
    counts = global_counts(
        {"a": np.array([1.0, 4.0]), "b": np.array([2.0, 40.0])}, {"a": 1, "b": 4}, 5, {"a": 2, "b": 2}
    )
    assert counts == {"a": 1, "b": 1}


def test_limits_hold() -> None:
    counts = global_counts({"a": np.zeros(10), "b": np.ones(10)}, {"a": 1, "b": 1}, 10, {"a": 4, "b": 10})
    assert counts == {"a": 4, "b": 6}
    with pytest.raises(ConfigError, match="may lose only 8"):
        global_counts({"a": np.zeros(10)}, {"a": 1}, 9, {"a": 8})


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_programming_finds_the_least_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = np.sort(rng.random((5, 4)), axis=1)
    costs = np.sort(rng.random((5, 4)), axis=1)[:, ::-1].copy()
    budget = float(costs.min(1).sum() * 0.5 + costs.max(1).sum() * 0.5)
    picks = cheapest(losses.tolist(), costs.tolist(), budget)
    rows = range(5)
    assert sum(costs[r, p] for r, p in zip(rows, picks, strict=True)) <= budget
    every = [p for p in itertools.product(range(4), repeat=5) if sum(costs[rows, p]) <= budget]
    best = min(float(losses[rows, p].sum()) for p in every)
    assert float(losses[rows, picks].sum()) == pytest.approx(best, abs=1e-3)


def test_a_budget_of_exactly_the_least_can_be_met() -> None:
    assert cheapest([[0, 1], [0, 1]], [[2, 1], [2, 1]], 2) == [1, 1]


def test_a_budget_below_the_least_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be met"):
        cheapest([[0, 1]], [[2, 1]], 0.9)
