"""How sparsity and learning rate change over a training. Pure functions of the share of the training that is done.

The cubic curve is that of Zhu and Gupta 2017 (arXiv 1710.01878); the large first step and the rewinds of the learning
rate are those of oBERT (Kurtic et al. 2022, arXiv 2203.07259).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from espalier.compression.config import Schedule, Training

_SLACK = 1e-9
"""A share that rounding leaves just short of a pruning counts as having reached it."""


def prunings(schedule: Schedule) -> list[tuple[float, float]]:
    """``(share of the training, share of the target)`` of every pruning, in order."""
    return SCHEDULES[schedule.kind](schedule)


def sparsity_at(schedule: Schedule, target: float, fraction_of_training: float) -> float:
    """The sparsity that must be reached when ``fraction_of_training`` (0..1) is done."""
    shares = [share for when, share in prunings(schedule) if when <= fraction_of_training + _SLACK]
    return target * shares[-1] if shares else 0.0


def learning_rate_at(schedule: Schedule, training: Training, fraction_of_training: float) -> float:
    """Linear warm-up and linear decay to zero, over the whole training or anew after every pruning (``rewind``)."""
    begin, end = 0.0, 1.0
    if schedule.rewind and schedule.kind == "gradual":
        cuts = [0.0, *(when for when, _ in prunings(schedule) if 0 < when < 1), 1.0]
        begin = max(cut for cut in cuts[:-1] if cut <= fraction_of_training + _SLACK)
        end = min(cut for cut in cuts[1:] if cut > begin)
    done = min(1.0, max(0.0, (fraction_of_training - begin) / (end - begin)))
    if done < training.warmup:
        # The first step, at 0, is a step too: half a per cent of the rate rather than none.
        return training.learning_rate * max(0.005, done / training.warmup)
    return training.learning_rate * (1 - done) / (1 - training.warmup)


def _oneshot(schedule: Schedule) -> list[tuple[float, float]]:
    return [(schedule.start, 1.0)]


def _gradual(schedule: Schedule) -> list[tuple[float, float]]:
    if schedule.steps == 1:
        return [(schedule.start, 1.0)]
    found = []
    for step in range(schedule.steps):
        done = step / (schedule.steps - 1)
        share = 1 - (1 - schedule.first) * (1 - done) ** 3
        found.append((schedule.start + done * (schedule.end - schedule.start), share))
    return found


def _constant(schedule: Schedule) -> list[tuple[float, float]]:
    return []


SCHEDULES: dict[str, Callable[[Schedule], list[tuple[float, float]]]] = {
    "oneshot": _oneshot,
    "gradual": _gradual,
    "constant": _constant,
}
