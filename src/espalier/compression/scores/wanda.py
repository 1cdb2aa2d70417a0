"""Weights times the norm of their inputs (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.compression.calibration import Loss, feed
from espalier.compression.layers import Layer
from espalier.compression.scores.base import Score


class Wanda(Score):
    """Compares ``|w| |x|`` within each output, as the paper does; blocks add up the squares, within a row of blocks.

    ``w^2 |x|^2`` is the error of the output when inputs are uncorrelated, which makes layers comparable.
    """

    name: ClassVar[str] = "wanda"
    unit: ClassVar[str] = "squared norm of the outputs, if inputs were uncorrelated"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._squares: dict[str, Tensor] = {}

    def collect(self, model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], loss: Loss) -> None:
        self._squares = {}

        def see(name: str, x: Tensor) -> None:
            squares = (x.double() ** 2).sum(0)
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

        feed(model, {name: layer.module for name, layer in layers.items()}, batches, loss, see)

    def scores(self, layer: Layer) -> Tensor:
        return layer.groups.reduce(layer.weight.double() ** 2 * self._squares[layer.name])

    def scale(self, layer: Layer) -> float:
        return float(self.scores(layer).sum()) or 1.0

    def select(self, layer: Layer, count: int) -> Tensor:
        scores = self.scores(layer).masked_fill(~layer.kept, -torch.inf)
        # The place of each group in its own row: the lowest of every row go first, rows of equal place by score.
        by_score = scores.argsort(dim=1, stable=True)
        places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        place = torch.zeros_like(scores).scatter_(1, by_score, places.to(scores.dtype))
        bounded = scores.clamp(min=0)
        return layer.groups.select(place + 0.5 * bounded / (1 + bounded.max()), count, layer.kept)

    def forget(self) -> None:
        self._squares = {}
