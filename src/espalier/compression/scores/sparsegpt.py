"""Second-order pruning layer by layer, from the inputs alone (OBC, arXiv 2208.11580; SparseGPT, arXiv 2301.00774).

A layer's loss is the squared error of its outputs on the calibration data, whose Hessian ``X^T X`` all rows of the
weight share. Groups are chosen and made up for column by column, in a few rounds. After each of them the weights left
are fitted anew by least squares, which SparseGPT leaves out and which is affordable at the size of encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compression.calibration import Loss, feed
from espalier.compression.layers import Layer
from espalier.compression.scores.base import Score
from espalier.compression.second_order import (
    column_scores,
    dampen,
    inverse_factor,
    output_error,
    output_errors,
    refit,
    sweep,
)

_CURVE = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99, 1.0)
"""Sparsities between which the loss is taken to be straight."""
_WELL_BEHAVED = 1e-3
"""Dampening from which fits can be computed in float32, which halves its time."""


class SparseGPT(Score):
    """``settings``: dampening, block and step of :class:`~espalier.compression.config.Calibration`."""

    name: ClassVar[str] = "sparsegpt"
    unit: ClassVar[str] = "squared norm of the layer's outputs"
    sequential: ClassVar[bool] = True

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._hessians: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(self, model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], loss: Loss) -> None:
        self.forget()
        counts = dict.fromkeys(layers, 0)
        sums = {
            name: torch.zeros(layer.shape[1], layer.shape[1], device=layer.module.weight.device)
            for name, layer in layers.items()
        }

        def see(name: str, x: Tensor) -> None:
            sums[name].addmm_(x.T, x)
            counts[name] += len(x)

        feed(model, {name: layer.module for name, layer in layers.items()}, batches, loss, see)
        self._hessians = {name: total / counts[name] for name, total in sums.items()}
        # In round numbers, which every pruning of a run has in common.
        note = f"Hessians of about {float(f'{max(counts.values()):.1e}'):,.0f} tokens"
        if self.settings.dampening:
            note += f", dampened by {self.settings.dampening:g} of their mean diagonal"
        self.notes = [*dict.fromkeys([*self.notes, note])]

    def scores(self, layer: Layer) -> Tensor:
        _, factor = self._prepared(layer)
        return column_scores(layer.weight, factor.T @ factor, layer.groups)

    def prune(self, layer: Layer, count: int) -> tuple[float, float]:
        hessian, factor = self._prepared(layer)
        dense, true = layer.weight.double(), self._hessians[layer.name].double()
        precision = torch.float32 if self.settings.dampening >= _WELL_BEHAVED else torch.float64
        weight, kept = dense, layer.kept
        for reached in self._rounds(kept, count):
            swept, kept = sweep(weight, factor, layer.groups, kept, reached, self.settings.block)
            fitted = refit(dense, hessian.to(precision), kept, layer.groups).double()
            # Least squares is the best there is; rounding in a bad matrix must not make things worse.
            weight = min((fitted, swept), key=lambda found: output_error(dense - found, hessian))
        zeroed = dense * layer.groups.expand(kept)
        whole = output_error(dense, true) or 1.0
        layer.write(weight, kept)
        return output_error(dense - zeroed, true) / whole, output_error(dense - weight, true) / whole

    def _rounds(self, kept: Tensor, count: int) -> list[int]:
        """How many groups are gone after each round, in which a share of those left goes."""
        gone, found = int((~kept).sum()), []
        while gone < count:
            gone = min(count, gone + max(1, round(self.settings.step * (kept.numel() - gone))))
            found.append(gone)
        return found

    def losses(self, layer: Layer, counts: Sequence[int]) -> list[float]:
        """Errors of the real thing: a copy of the layer is pruned to each count, in a single sweep without a fit.

        Each output's error is relative to its own size, since encoders have a few outputs so large that they would
        decide alone; and a layer counts by its weights.
        """
        _, factor = self._prepared(layer)
        dense, true = layer.weight.double(), self._hessians[layer.name].double()
        whole = output_errors(dense, true).clamp(min=torch.finfo(torch.float64).tiny)
        gone = int((~layer.kept).sum())

        def loss(count: int) -> float:
            swept, _ = sweep(dense, factor, layer.groups, layer.kept, count, self.settings.block)
            return float((output_errors(dense - swept, true) / whole).mean()) * dense.numel()

        return [0.0 if count <= gone else loss(count) for count in counts]

    def increments(self, layer: Layer) -> np.ndarray:
        """Slopes between the losses of a few counts: inputs that stand in for each other make single scores too low."""
        gone, size = int((~layer.kept).sum()), layer.kept.numel()
        counts = sorted({max(gone, min(size, round(share * size))) for share in _CURVE} | {gone})
        slopes = np.diff(self.losses(layer, counts)) / np.diff(counts)
        return np.repeat(np.maximum.accumulate(np.maximum(slopes, 0)), np.diff(counts))

    def forget(self) -> None:
        self._hessians = {}
        self._factors = {}

    def _prepared(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The dampened Hessian and the factor of its inverse, both float64 ``[inputs, inputs]``."""
        if layer.name not in self._factors:
            hessian = dampen(self._hessians[layer.name], self.settings.dampening)
            factor = inverse_factor(hessian, f"the Hessian of the layer {layer.name!r}")
            self._factors = {layer.name: (hessian, factor)}  # of one layer at a time: they are large
        return self._factors[layer.name]
