"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): let weights take over what single features have in size.

A feature that is much larger than the others wastes the range that all inputs of a layer share. Dividing it by ``s``
where it is made and multiplying the columns of the weight that reads it by ``s`` changes nothing but that. It is exact
only where nobody else reads the feature and nothing but a linear map lies between: from the values of an attention to
its output layer, and between the two feed-forward layers where the activation is a ReLU. The outputs of LayerNorm, the
usual place, feed a residual as well in the encoders of this project; GELU is not linear.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.compression.structured import Stack
from espalier.errors import UnsupportedModelError


@dataclass(frozen=True)
class Pair:
    """``reader`` is called ``name`` and reads what ``maker`` makes, feature by feature."""

    name: str
    maker: nn.Linear
    reader: nn.Linear


def pairs_of(model: nn.Module, names: Collection[str]) -> tuple[list[Pair], list[str]]:
    """Pairs whose reader is among ``names``, and notes on what cannot be smoothed."""
    try:
        stack = Stack.of(model)
        parts = stack.names().names
    except UnsupportedModelError as error:
        return [], [f"nothing was smoothed: {error}"]
    steps = [(parts.value, parts.mix)]
    notes = ["not smoothed: inputs from LayerNorm, which feed a residual too"]
    activation = getattr(stack.config, stack.setting("hidden_act"))
    if activation == "relu":
        steps.append((parts.up, parts.down))
    else:
        notes.append(f"not smoothed: inputs of {parts.down}, since {activation} is not linear")
    found = [
        Pair(name, stack.part(index, maker)[1], reader)
        for index in range(len(stack.layers))
        for maker, path in steps
        for name, reader in [stack.part(index, path)]
        if name in names
    ]
    return found, notes


def smooth(pair: Pair, largest: Tensor, strength: float) -> None:
    """Move size from the inputs of a pair's reader into its weight, in place.

    ``largest`` ``[features]``: the largest magnitude of each feature in calibration. The factor of a feature is
    ``largest^strength / weight^(1 - strength)`` with the largest weight of its column; features or columns of zeros
    stay as they are.
    """
    maker, reader = pair.maker, pair.reader
    with torch.no_grad():
        weight = reader.weight.abs().amax(0)
        there = (largest > 0) & (weight > 0)
        factor = torch.where(there, largest**strength / weight ** (1 - strength), 1.0)
        factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
        reader.weight.mul_(factor)
        maker.weight.div_(factor[:, None])
        if maker.bias is not None:
            maker.bias.div_(factor)
