"""Schedules: when how much goes, and the learning rate in between."""

from __future__ import annotations

from itertools import pairwise

import pytest

from espalier.compression.config import Schedule, Training
from espalier.compression.schedules import learning_rate_at, prunings, sparsity_at


def test_one_shot_is_all_at_the_start() -> None:
    schedule = Schedule(kind="oneshot", start=0.25)
    assert [sparsity_at(schedule, 0.8, f) for f in (0.0, 0.24, 0.25, 1.0)] == [0.0, 0.0, 0.8, 0.8]


def test_gradual_has_a_large_first_step_and_flattens() -> None:
    schedule = Schedule(kind="gradual", steps=4, first=0.5, start=0.0, end=0.6)
    shares = [share for _, share in prunings(schedule)]
    assert shares[0] == 0.5
    assert shares[-1] == 1.0
    steps = [b - a for a, b in pairwise(shares)]
    assert steps == sorted(steps, reverse=True)
    assert shares[1] == pytest.approx(1 - 0.5 * (2 / 3) ** 3)
    assert [when for when, _ in prunings(schedule)] == pytest.approx([0, 0.2, 0.4, 0.6])
    seen = [sparsity_at(schedule, 0.9, i / 1000) for i in range(1001)]
    assert seen == sorted(seen)
    assert len(set(seen)) == 4


def test_a_single_gradual_step_is_one_shot() -> None:
    assert prunings(Schedule(kind="gradual", steps=1, start=0.1)) == [(0.1, 1.0)]


def test_constant_prunes_nothing() -> None:
    assert sparsity_at(Schedule(kind="constant"), 0.9, 1.0) == 0.0


def test_the_rate_starts_anew_after_each_pruning() -> None:
    schedule = Schedule(kind="gradual", steps=3, start=0.0, end=0.5, rewind=True)
    training = Training(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(schedule, training, i / 1000) for i in range(1000)]
    peaks = [i for i in range(1, 999) if rates[i - 1] < rates[i] >= rates[i + 1]]
    assert peaks == [25, 275, 550]
    assert all(rates[i] == pytest.approx(1.0) for i in peaks)
    assert rates[249] < 0.01
    assert min(rates) > 0


def test_without_rewinds_the_rate_falls_once() -> None:
    schedule = Schedule(kind="gradual", rewind=False)
    training = Training(learning_rate=2.0, warmup=0.0)
    assert [learning_rate_at(schedule, training, f) for f in (0, 0.5, 1)] == [2.0, 1.0, 0.0]
