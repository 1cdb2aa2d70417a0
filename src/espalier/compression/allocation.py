"""How a target is spread over layers. Pure functions of scores, losses and costs; NumPy only.

``uniform``: every layer the same. ``global``: one threshold over the scores of all layers. ``cost``: least loss among
the choices that are fast enough, by dynamic programming over a grid of sparsities per layer, as in SPDY (Frantar and
Alistarh 2022, arXiv 2201.13096) and ZipLM (Kurtic et al. 2023, arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from espalier.errors import ConfigError

ALLOCATIONS = ("uniform", "global", "cost")

_BINS = 10_000
"""Steps into which the time budget is cut. Costs are rounded up, so that the budget is kept."""


def global_counts(
    scores: Mapping[str, np.ndarray], sizes: Mapping[str, int], target: int, limits: Mapping[str, int]
) -> dict[str, int]:
    """How many groups of each layer lie below the one threshold that takes ``target`` weights away.

    ``scores``: of every group, by layer, in any order; the lowest go. ``sizes``: weights in a group of each layer.
    ``limits``: the most groups that a layer may lose. Raises ConfigError when the limits do not allow the target.
    """
    if target > (most := sum(limits[name] * sizes[name] for name in scores)):
        raise ConfigError(f"{target} weights were to go, but the layers may lose only {most}; lower the sparsity")
    names = list(scores)
    allowed = [np.sort(np.asarray(scores[name], np.float64).ravel())[: limits[name]] for name in names]
    owner = np.concatenate([np.full(len(part), i) for i, part in enumerate(allowed)])
    weights = np.concatenate([np.full(len(part), sizes[n]) for n, part in zip(names, allowed, strict=True)])
    # By score per weight, so that layers with groups of different sizes compete fairly.
    order = np.argsort(np.concatenate(allowed) / weights, kind="stable")
    taken = np.cumsum(weights[order])
    stop = int(np.searchsorted(taken, target))
    if stop < len(taken) and (stop == 0 or taken[stop] - target <= target - taken[stop - 1]):
        stop += 1
    counts = np.bincount(owner[order[:stop]], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def cheapest(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One choice for each layer, with the least total loss among those of total cost at most ``budget``.

    ``losses[layer][choice]`` and ``costs[layer][choice]`` in any one unit. Exact for costs rounded up to a
    ten-thousandth of the budget. Raises ConfigError when even the cheapest choices cost more.
    """
    least = sum(min(row) for row in costs)
    if budget < least:
        raise ConfigError(
            f"the budget of {budget:.4g} cannot be met: the cheapest choice for every layer takes {least:.4g}; "
            "lower the speed-up, or let the layers that are excluded be pruned too"
        )
    # The cheapest choices are free and the rest counts as extra: then the budget is met even where rounding is coarse.
    room = budget - least
    unit = room / _BINS
    best = np.zeros(_BINS + 1)
    picks: list[np.ndarray] = []
    steps: list[list[int]] = []
    for layer_losses, layer_costs in zip(losses, costs, strict=True):
        floor = min(layer_costs)
        extra = [_bins(cost - floor, unit) for cost in layer_costs]
        table = np.full((len(extra), _BINS + 1), np.inf)
        for choice, (loss, step) in enumerate(zip(layer_losses, extra, strict=True)):
            if step <= _BINS:
                table[choice, step:] = best[: _BINS + 1 - step] + loss
        picks.append(table.argmin(0))
        steps.append(extra)
        best = table.min(0)
    place = _BINS
    found: list[int] = []
    for pick, extra in zip(reversed(picks), reversed(steps), strict=True):
        choice = int(pick[place])
        found.append(choice)
        place -= extra[choice]
    return found[::-1]


def _bins(cost: float, unit: float) -> int:
    if cost <= 0:
        return 0
    return _BINS + 1 if unit <= 0 else min(_BINS + 1, int(np.ceil(cost / unit - 1e-9)))
