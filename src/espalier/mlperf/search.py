"""The highest rate that is sustained: bracketing, then halving the interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from espalier.errors import RulesError

GROWTH = 1.15
"""Factor between rates while there is no interval yet."""
MOST_TRIALS = 20


@dataclass
class RateSearch:
    """``valid`` is the highest rate that was sustained, ``invalid`` the lowest above it that was not (None if none)."""

    valid: float
    invalid: float | None
    trials: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def certainty(self) -> str:
        """How sure it is, in a sentence."""
        runs = f"{len(self.trials)} short runs"
        if self.invalid is None:
            return f"at least {self.valid:.4g}/s: no rate tried was too high, in {runs}"
        width = (self.invalid / self.valid - 1) * 100
        return f"between {self.valid:.4g} and {self.invalid:.4g}/s ({width:.1f} % apart), from {runs}"


def find_rate(
    sustained: Callable[[float], bool], start: float, *, precision: float, ceiling: float | None = None
) -> RateSearch:
    """Search upwards and downwards from ``start`` until the interval is narrower than ``precision`` (0.03 is 3 %).

    ``sustained`` tries a rate; it is assumed to hold below a threshold and not above, and may be wrong near it.
    ``ceiling`` is a rate that cannot be exceeded. Raises RulesError when not even a small part of ``start`` is
    sustained.
    """
    trials: list[tuple[float, bool]] = []
    low: float | None = None
    high: float | None = None
    rate = start
    while len(trials) < MOST_TRIALS:
        good = sustained(rate)
        trials.append((rate, good))
        if good:
            low = rate
        else:
            high = rate
        if low is not None and high is not None:
            if high / low - 1 <= precision:
                break
            rate = (low * high) ** 0.5
        elif low is not None:
            if ceiling is not None and low >= ceiling:
                break
            rate = low * GROWTH if ceiling is None else min(low * GROWTH, ceiling)
        elif high is not None:
            rate = high / GROWTH**2
    if low is None:
        raise RulesError(
            f"no rate down to {trials[-1][0]:.3g}/s kept the latency bound; the engine is too slow for this scenario, "
            "or something else has the machine"
        )
    return RateSearch(low, high, trials)
