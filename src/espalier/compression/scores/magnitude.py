"""The squares of the weights. Knows nothing of the data."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from espalier.compression.layers import Layer
from espalier.compression.scores.base import Score


class Magnitude(Score):
    """Removes the groups of the smallest norm."""

    name: ClassVar[str] = "magnitude"
    unit: ClassVar[str] = "squared norm of the weights"
    needs_data: ClassVar[bool] = False

    def scores(self, layer: Layer) -> Tensor:
        return layer.groups.reduce(layer.weight.double() ** 2)

    def scale(self, layer: Layer) -> float:
        return float(self.scores(layer).sum()) or 1.0
