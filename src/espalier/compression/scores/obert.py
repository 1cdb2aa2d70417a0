"""Second-order pruning from gradients of the loss: oBERT (Kurtic et al. 2022, arXiv 2203.07259).

The Fisher matrix ``mean(g g^T)`` of single samples' gradients stands for the Hessian of the loss, in blocks of a few
dozen weights. The paper updates its inverse by a rank-one formula (Woodbury) for every gradient; here the blocks are
added up and factored once, which gives the same matrix and costs less when there are more gradients than weights in a
block. Inside a block groups go one by one, so that each is judged with those before it gone, and the weights left are
then adjusted for all that went together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.compression.calibration import Loss, sample_gradients
from espalier.compression.groups import Groups
from espalier.compression.layers import Layer
from espalier.compression.scores.base import Score
from espalier.compression.second_order import compensate, eliminate

_CHUNK = 1 << 19
"""Numbers in the blocks that are worked on at a time; they should stay in a cache."""


class OBert(Score):
    """``settings``: dampening and fisher_block of :class:`~espalier.compression.config.Calibration`."""

    name: ClassVar[str] = "obert"
    unit: ClassVar[str] = "loss of removing the whole layer, to second order"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._fisher: dict[str, Tensor] = {}
        self._tiles: dict[str, Tiles] = {}
        self._scores: dict[str, Tensor] = {}

    def collect(self, model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], loss: Loss) -> None:
        self.forget()
        self._tiles = {
            n: Tiles.of(layer.groups, layer.shape, self.settings.fisher_block) for n, layer in layers.items()
        }
        for name, layer in layers.items():
            tiles = self._tiles[name]
            size = tiles.size
            self._fisher[name] = torch.zeros(
                layer.module.weight.numel() // size, size, size, device=layer.module.weight.device
            )

        def see(name: str, gradients: Tensor) -> None:
            g = self._tiles[name].cut(gradients)  # [samples, blocks, size]
            g = g.transpose(0, 1)
            self._fisher[name].baddbmm_(g.transpose(1, 2), g)

        modules = {name: layer.module for name, layer in layers.items()}
        samples = sample_gradients(model, modules, batches, loss, see)
        for fisher in self._fisher.values():
            fisher /= samples
        note = f"Fisher matrices of {samples} samples in blocks of {max(t.size for t in self._tiles.values())} weights"
        if self.settings.dampening:
            note += f", dampened by {self.settings.dampening:g} of their mean diagonal"
        self.notes = [*dict.fromkeys([*self.notes, note])]

    def scores(self, layer: Layer) -> Tensor:
        """The loss that each group adds when its block's groups go one by one; of groups larger than a block, all."""
        if layer.name in self._scores:
            return self._scores[layer.name]
        tiles, fisher = self._tiles[layer.name], self._fisher[layer.name]
        weight = tiles.cut(layer.weight[None])[0]
        if tiles.inside:
            kept = tiles.cut_groups(layer.kept)
            parts = []
            for rows in _chunks(fisher):
                block = self._dampened(layer.name, rows)
                members = weight[rows].double().reshape(len(block), tiles.groups, -1)
                parts.append(eliminate(block, members, kept[rows], f"the Fisher matrix of the layer {layer.name!r}"))
            found = tiles.join_groups(torch.cat(parts))
        else:
            parts = []
            for rows in _chunks(fisher):
                w = weight[rows].double()
                parts.append((w * (self._dampened(layer.name, rows) @ w[:, :, None]).squeeze(2)) / 2)
            found = layer.groups.reduce(tiles.join(torch.cat(parts)))
        self._scores = {layer.name: found}
        return found

    def prune(self, layer: Layer, count: int) -> tuple[float, float]:
        kept = self.select(layer, count)
        tiles, fisher = self._tiles[layer.name], self._fisher[layer.name]
        dense = tiles.cut(layer.weight[None])[0].double()
        mask = tiles.cut((layer.mask & layer.groups.expand(kept))[None])[0]
        result = torch.empty_like(dense)
        whole = zeroed = updated = 0.0
        for rows in _chunks(fisher):
            block, w, stay = self._dampened(layer.name, rows), dense[rows], mask[rows]
            new = compensate(block, w, stay) if tiles.inside else w * stay
            result[rows] = new
            whole += _loss(block, w)
            zeroed += _loss(block, w * ~stay)
            updated += _loss(block, w - new)
        layer.write(tiles.join(result), kept)
        self._scores = {}
        whole = whole or 1.0
        return zeroed / whole, updated / whole

    def forget(self) -> None:
        self._fisher = {}
        self._tiles = {}
        self._scores = {}

    def _dampened(self, name: str, rows: slice) -> Tensor:
        """Some blocks in float64, with a share of the mean diagonal of the whole layer, so that they compare."""
        fisher = self._fisher[name]
        block = fisher[rows].double()
        if self.settings.dampening:
            block.diagonal(dim1=1, dim2=2).add_(
                self.settings.dampening * float(fisher.diagonal(dim1=1, dim2=2).mean(dtype=torch.float64))
            )
        return block


class Tiles:
    """How a matrix ``[outputs, inputs]`` is cut into the blocks of a Fisher matrix.

    A tile is one row of groups high and as many groups wide as fit into a block, or, for groups larger than a block, a
    piece of one. Weights of a group stand together in a block.
    """

    def __init__(self, shape: tuple[int, int], rows: int, columns: int, groups: int) -> None:
        self.shape, self.rows, self.columns, self.groups = shape, rows, columns, groups

    @staticmethod
    def of(groups: Groups, shape: tuple[int, int], limit: int) -> Tiles:
        if groups.size <= limit:
            across = shape[1] // groups.columns
            many = max(n for n in range(1, limit // groups.size + 1) if across % n == 0)
            return Tiles(shape, groups.rows, groups.columns, many)
        columns = max(n for n in range(1, min(limit, groups.columns) + 1) if groups.columns % n == 0)
        rows = max(n for n in range(1, max(1, limit // columns) + 1) if groups.rows % n == 0)
        return Tiles(shape, rows, columns, 0)

    @property
    def inside(self) -> bool:
        """Whether groups lie inside of blocks."""
        return self.groups > 0

    @property
    def size(self) -> int:
        """Weights in a block."""
        return self.rows * self.columns * max(1, self.groups)

    @property
    def _view(self) -> tuple[int, ...]:
        outputs, inputs = self.shape
        many = max(1, self.groups)
        return outputs // self.rows, self.rows, inputs // (self.columns * many), many, self.columns

    def cut(self, values: Tensor) -> Tensor:
        """``[samples, outputs, inputs]`` to ``[samples, blocks, size]``."""
        return values.reshape(-1, *self._view).permute(0, 1, 3, 4, 2, 5).reshape(len(values), -1, self.size)

    def join(self, blocks: Tensor) -> Tensor:
        """``[blocks, size]`` to ``[outputs, inputs]``."""
        down, rows, across, many, columns = self._view
        return blocks.reshape(down, across, many, rows, columns).permute(0, 3, 1, 2, 4).reshape(self.shape)

    def cut_groups(self, groups: Tensor) -> Tensor:
        """``[group rows, group columns]`` to ``[blocks, groups in a block]``."""
        return groups.reshape(-1, self.groups)

    def join_groups(self, blocks: Tensor) -> Tensor:
        """The reverse of :meth:`cut_groups`."""
        return blocks.reshape(self.shape[0] // self.rows, -1)


def _chunks(fisher: Tensor) -> list[slice]:
    step = max(1, _CHUNK // (fisher.shape[1] * fisher.shape[2]))
    return [slice(begin, begin + step) for begin in range(0, len(fisher), step)]


def _loss(fisher: Tensor, change: Tensor) -> float:
    return float((change * (fisher @ change[:, :, None]).squeeze(2)).sum()) / 2
