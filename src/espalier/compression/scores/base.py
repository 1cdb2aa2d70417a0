"""What every score offers the pruner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from espalier.compression.calibration import Loss
from espalier.compression.layers import Layer


class Score(ABC):
    """Ranks groups by what removing them costs, and removes them."""

    name: ClassVar[str]

    unit: ClassVar[str]
    """What the errors of :meth:`prune` are relative to, as a report says it."""

    needs_data: ClassVar[bool] = True
    """Whether :meth:`collect` looks at batches."""

    sequential: ClassVar[bool] = False
    """Whether a layer should be pruned only after those it gets its inputs from."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.notes: list[str] = []

    def collect(self, model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], loss: Loss) -> None:  # noqa: B027 -- optional
        """Learn what is needed about ``layers`` from calibration batches."""

    @abstractmethod
    def scores(self, layer: Layer) -> Tensor:
        """What removing each group costs, ``[group rows, group columns]``, float."""

    def scale(self, layer: Layer) -> float:
        """What a layer's scores are divided by to be compared with those of other layers."""
        return 1.0

    def select(self, layer: Layer, count: int) -> Tensor:
        """The groups that stay when ``count`` are gone, bool ``[group rows, group columns]``."""
        return layer.groups.select(self.scores(layer), count, layer.kept)

    def prune(self, layer: Layer, count: int) -> tuple[float, float]:
        """Remove groups until ``count`` are gone, in place. Returns the errors without and with the weights' update."""
        scores = self.scores(layer)
        kept = self.select(layer, count)
        error = relative(scores[~kept].sum(), scores.sum())
        layer.write(layer.weight, kept)
        return error, error

    def increments(self, layer: Layer) -> np.ndarray:
        """The loss that each further group adds, from the first to go to the last, comparable between layers."""
        return (self.scores(layer)[layer.kept].double() / self.scale(layer)).sort().values.cpu().numpy()

    def losses(self, layer: Layer, counts: Sequence[int]) -> list[float]:
        """An estimate of the loss when so many groups are gone, comparable between layers."""
        # What is gone already costs nothing more.
        running = np.concatenate([np.zeros(int((~layer.kept).sum()) + 1), self.increments(layer).cumsum()])
        return [float(running[count]) for count in counts]

    def observe(self, layers: Mapping[str, Layer]) -> None:  # noqa: B027 -- optional
        """See the gradients of a training step."""

    def forget(self) -> None:  # noqa: B027 -- optional
        """Let go of what :meth:`collect` has learned; it is of no use once weights have changed."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive an interruption."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 -- optional
        """The reverse of :meth:`state_dict`."""


def relative(part: Tensor, whole: Tensor) -> float:
    """``part / whole``; 0 where both are."""
    return float(part / whole) if float(whole) != 0 else float(part)
