"""Whether two runtimes gave the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 2e-4
"""Largest error allowed by default, relative to the largest expected magnitude (at least 1)."""


@dataclass(frozen=True)
class Agreement:
    """How far one output is from the peer's.

    ``error`` is the largest absolute difference over ``max(1, largest expected magnitude)``; infinity where shape,
    type, or the places of NaN and infinity differ, and ``reason`` then says which.
    """

    output: str
    error: float
    tolerance: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (a NaN never is)."""
        return bool(self.error <= self.tolerance)

    def __str__(self) -> str:
        detail = self.reason or f"relative error {self.error:.2e}"
        return f"{self.output}: {detail} ({'within' if self.ok else 'beyond'} {self.tolerance:.0e})"


def compare(
    names: Sequence[str],
    want: Sequence[np.ndarray],
    got: Sequence[np.ndarray],
    *,
    mask: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> list[Agreement]:
    """Compare ``got`` with ``want``, output by output.

    ``mask`` (``[batch, seq]``, 1 for a token) leaves padding out of outputs that begin with those two extents.
    Integers and booleans must be equal; floats agree within ``tolerance``.
    """
    return [
        _compare(name, np.asarray(w), np.asarray(g), mask, tolerance)
        for name, w, g in zip(names, want, got, strict=True)
    ]


def _compare(name: str, want: np.ndarray, got: np.ndarray, mask: np.ndarray | None, tolerance: float) -> Agreement:
    if want.shape != got.shape or want.dtype != got.dtype:
        reason = f"got {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}"
        return Agreement(name, float("inf"), tolerance, reason)
    if mask is not None and want.shape[:2] == mask.shape:
        want, got = want[mask != 0], got[mask != 0]
    if want.size == 0:
        return Agreement(name, 0.0, tolerance)
    if want.dtype.kind not in "fc":
        differing = int((want != got).sum())
        reason = f"{differing} of {want.size} values differ" if differing else ""
        return Agreement(name, float("inf") if differing else 0.0, tolerance, reason)
    special = ~np.isfinite(want)
    if not np.array_equal(special, ~np.isfinite(got)) or not np.array_equal(
        want[special], got[special], equal_nan=True
    ):
        return Agreement(name, float("inf"), tolerance, "NaN or infinity in different places")
    want, got = want[~special].astype(np.float64), got[~special].astype(np.float64)
    if want.size == 0:
        return Agreement(name, 0.0, tolerance)
    return Agreement(name, float(np.abs(want - got).max() / max(1.0, np.abs(want).max())), tolerance)
