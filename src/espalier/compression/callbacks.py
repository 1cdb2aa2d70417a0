"""Pruning inside the Trainer of transformers.

    trainer.add_callback(PruningCallback(Config(sparsity=0.8)))

For any other loop there is :class:`espalier.compression.hook.PruningHook`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.config import Config
from espalier.compression.hook import PruningHook
from espalier.errors import ConfigError, MissingDependencyError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "the callback needs the package transformers, which is not installed: pip install 'espalier[compress]'"
    ) from error


class PruningCallback(TrainerCallback):
    """A :class:`~espalier.compression.hook.PruningHook` over the trainer's optimiser steps.

    ``batches`` and ``loss`` are those of the hook; without them, calibration takes the trainer's own batches and the
    model's own ``loss`` output, which needs labels in the batches.
    """

    def __init__(
        self,
        config: Config,
        batches: Callable[[], Iterable[Any]] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.hook: PruningHook | None = None
        self._batches, self._loss = batches, loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the model, and prune what the schedule wants gone at the start."""
        model: nn.Module = kwargs["model"]
        loader = kwargs.get("train_dataloader")
        if self._batches is None and loader is None:
            raise ConfigError("the trainer shows no training data to callbacks; give PruningCallback its batches")
        self.hook = PruningHook(
            model,
            self.config,
            steps=max(1, int(state.max_steps)),
            batches=self._batches or (lambda: self._own(model, loader)),
            loss=self._loss or _own_loss,
        )
        self.hook.step = int(state.global_step)
        self.hook.advance(kwargs.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See gradients."""
        if self.hook is not None:
            self.hook.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep zeros and prune on."""
        if self.hook is not None:
            self.hook.after_step(kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave no weight between zeros that an averaging or a late step may have moved."""
        if self.hook is not None:
            self.hook.pruner.enforce()

    def _own(self, model: nn.Module, loader: Any) -> Iterable[Any]:
        device = next(model.parameters()).device
        # The generator of the loader's sampler is the trainer's: using it would change the order of the training.
        generator = torch.Generator().manual_seed(self.config.seed)
        sampler = torch.utils.data.RandomSampler(loader.dataset, generator=generator)
        own = torch.utils.data.DataLoader(
            loader.dataset, batch_size=loader.batch_size or 1, sampler=sampler, collate_fn=loader.collate_fn
        )
        for batch in own:
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError("the model returned no loss for a batch; give the batches labels, or PruningCallback a loss")
    return loss
