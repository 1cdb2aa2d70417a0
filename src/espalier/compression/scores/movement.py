"""Weights that training moves towards zero (Sanh, Wolf and Rush 2020, arXiv 2005.07683)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from espalier.compression.layers import Layer
from espalier.compression.scores.base import Score
from espalier.errors import TrainingError


class Movement(Score):
    """Adds up ``-w dL/dw`` over training steps: negative where descent shrinks a weight, and those go first."""

    name: ClassVar[str] = "movement"
    unit: ClassVar[str] = "sum of -w dL/dw"
    needs_data: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._sums: dict[str, Tensor] = {}

    def observe(self, layers: Mapping[str, Layer]) -> None:
        with torch.no_grad():
            for name, layer in layers.items():
                weight, grad = layer.module.weight, layer.module.weight.grad
                if grad is None:
                    continue
                moved = (weight.float() * grad.float()).neg_()
                if name in self._sums:
                    self._sums[name] = self._sums[name].to(moved.device).add_(moved)
                else:
                    self._sums[name] = moved

    def scores(self, layer: Layer) -> Tensor:
        if layer.name not in self._sums:
            raise TrainingError(
                f"the score 'movement' has seen no gradient of the layer {layer.name!r}; it learns from training "
                "steps: let the schedule start after 0, and call observe() after every backward pass"
            )
        return layer.groups.reduce(self._sums[layer.name].to(layer.module.weight.device).double())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sums = {name: tensor.clone() for name, tensor in state.items()}
