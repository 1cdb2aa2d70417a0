"""When two outputs count as the same."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.bench import compare


def one(want: np.ndarray, got: np.ndarray, **options: object):  # type: ignore[no-untyped-def]
    (agreement,) = compare(["y"], [want], [got], **options)  # type: ignore[arg-type]
    return agreement


def test_small_differences_agree_relative_to_the_largest_value() -> None:
    want = np.array([1000.0, 1.0], np.float32)
    assert one(want, want + np.float32(0.1)).ok
    assert not one(want, want + np.float32(1)).ok


def test_errors_below_one_are_absolute() -> None:
    want = np.full(3, 1e-6, np.float32)
    assert one(want, want * 2).ok


@pytest.mark.parametrize(
    ("want", "got", "reason"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "expected"),
        (np.zeros(2, np.float32), np.zeros(2, np.float64), "expected"),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), "NaN"),
        (np.array([1.0, 2.0]), np.array([1.0, np.nan]), "NaN"),
        (np.array([np.inf]), np.array([-np.inf]), "NaN or infinity"),
        (np.array([1, 2]), np.array([1, 3]), "1 of 2"),
    ],
)
def test_what_never_agrees(want: np.ndarray, got: np.ndarray, reason: str) -> None:
    agreement = one(want, got, tolerance=1e9)
    assert not agreement.ok
    assert reason in str(agreement)


def test_equal_nan_and_infinity_agree() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert one(values, values.copy()).ok


def test_padding_does_not_count() -> None:
    mask = np.array([[1, 1, 0]])
    want = np.zeros((1, 3, 2), np.float32)
    got = want.copy()
    got[0, 2] = 7
    assert not one(want, got).ok
    assert one(want, got, mask=mask).ok


def test_empty_outputs_agree() -> None:
    assert one(np.zeros((0, 4)), np.zeros((0, 4))).ok
