"""Any module with any batches: what ``espalier.compress(module, config, batches=..., loss=...)`` uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from espalier.compression.tasks.base import Task
from espalier.errors import InputError


class CustomTask(Task):
    """``loss(model, batch)`` returns a scalar for each of ``batches``, a sequence of anything."""

    name: ClassVar[str] = "custom"

    def __init__(self, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        if not isinstance(batches, Sequence):
            raise InputError(
                f"batches must be a sequence, so that they can be shuffled and visited again; got "
                f"{type(batches).__name__}: pass list(batches)"
            )
        if not batches:
            raise InputError("batches is empty; give at least one")
        self._batches = batches
        self._loss = loss

    def epoch(self, budget: int, *, seed: int, epoch: int) -> list[int]:
        return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(len(self._batches))]

    def batch(self, key: int) -> Any:
        return self._batches[key]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._loss(model, batch)
