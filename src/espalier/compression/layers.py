"""The linear layers of a model that may be pruned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from espalier.compression.convolution import Convolution
from espalier.compression.groups import Groups
from espalier.errors import ConfigError

_LEFT_ALONE = re.compile(r"(^|\.)(embeddings?\w*|pooler|classifier|pre_classifier|qa_outputs|\w*head|score|cls)(\.|$)")
"""Parts that hold few weights and matter much."""
_COLOURS = 3


@dataclass(frozen=True)
class Layer:
    """A linear layer being pruned. ``masks`` are those of all layers, bool ``[outputs, inputs]``, True for what stays.

    ``followers`` name layers whose outputs feed nothing but this one's inputs: when whole input columns go, the same
    rows of theirs go too.
    """

    name: str
    module: nn.Linear
    groups: Groups
    masks: dict[str, Tensor]
    followers: dict[str, nn.Linear] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.module.out_features, self.module.in_features

    @property
    def divided(self) -> tuple[int, int]:
        """What a pattern has to divide: the shape, of a convolution outputs and channels."""
        outputs, inputs = self.shape
        return outputs, self.module.in_channels if isinstance(self.module, Convolution) else inputs

    @property
    def weight(self) -> Tensor:
        """float32 ``[outputs, inputs]``, detached; the parameter itself where that is float32 already."""
        return self.module.weight.detach().float()

    @property
    def mask(self) -> Tensor:
        """This layer's own mask, on the device of its weight."""
        device = self.module.weight.device
        if self.masks[self.name].device != device:
            self.masks[self.name] = self.masks[self.name].to(device)
        return self.masks[self.name]

    @property
    def kept(self) -> Tensor:
        """bool ``[group rows, group columns]``: groups of which anything is left."""
        return self.groups.reduce(self.mask.float()) > 0

    def write(self, weight: Tensor, kept: Tensor) -> None:
        """Put in new weights ``[outputs, inputs]``, zero outside of the groups ``kept``."""
        with torch.no_grad():
            mask = self.mask & self.groups.expand(kept)
            self.masks[self.name] = mask
            self.module.weight.copy_(torch.where(mask, weight, 0.0))
            columns = mask.any(0)
            for name, follower in self.followers.items():
                rows = self.masks[name].to(columns.device) & columns[:, None]
                self.masks[name] = rows
                follower.weight.mul_(rows)


def _reads_colours(module: nn.Module) -> bool:
    return isinstance(module, Convolution) and module.in_channels <= _COLOURS


def find_linear(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers to prune by name: linear layers in the stack of encoder layers, in a model without one all of them.

    Embeddings, poolers, heads and the convolution that reads an image's colours are left alone unless a regular
    expression of ``include`` is found in their name; what ``exclude`` finds is left alone always. Raises ConfigError
    when nothing is left or an expression finds nothing.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for kind, expressions in (("include", include), ("exclude", exclude)):
        for expression in expressions:
            if not any(re.search(expression, name) for name in linear):
                raise ConfigError(
                    f"{kind}: {expression!r} matches none of the model's {len(linear)} linear layers"
                    + (f", such as {next(iter(linear))!r}" if linear else "")
                )
    stacks = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    stacked = [name for name in linear if any(name.startswith(f"{stack}.") for stack in stacks)]
    usual = [name for name in stacked or linear if not _LEFT_ALONE.search(name) and not _reads_colours(linear[name])]
    found = {
        name: module
        for name, module in linear.items()
        if (name in usual or any(re.search(e, name) for e in include)) and not any(re.search(e, name) for e in exclude)
    }
    if not found:
        raise ConfigError(
            f"the model has no linear layer to prune; of its {len(linear)}, embeddings, poolers and heads count only "
            "when config.include names them"
        )
    return found
