"""Pruning inside other people's training loops.

With the Hugging Face Trainer:

    trainer.add_callback(PruningCallback(Config(sparsity=0.8), batches, loss))

With a plain loop of a known number of steps:

    hook = PruningHook(model, Config(sparsity=0.8), steps=len(loader) * epochs, batches=batches, loss=loss)
    ...
        hook.before_step()  # after loss.backward()
        optimizer.step()
        hook.after_step(optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.config import Config
from espalier.compression.pruner import Pruner, PruneReport
from espalier.compression.schedules import sparsity_at
from espalier.errors import ConfigError, MissingDependencyError

try:
    from transformers import TrainerCallback
except ImportError as error:  # the hook for plain loops is in this file too, but nobody has torch without reason
    raise MissingDependencyError(
        "callbacks need the package transformers, which is not installed: pip install 'espalier[compress]'"
    ) from error


class PruningHook:
    """Prunes ``model`` as ``config.schedule`` says while a loop of ``steps`` optimiser steps trains it.

    ``batches()`` gives calibration batches and ``loss(model, batch)`` their loss, a scalar; the score asks for them
    when it needs data. ``reports`` holds one report for each pruning. ``config.training`` and ``config.recovery`` are
    the loop's own business and are not looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        steps: int,
        batches: Callable[[], Iterable[Any]],
        loss: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, the optimiser steps of the whole loop; got {steps}")
        self.pruner = Pruner(model, config)
        self.steps = steps
        self.step = 0
        self.reports: list[PruneReport] = []
        self._model, self._config, self._batches, self._loss = model, config, batches, loss
        self._reached = 0.0

    def before_step(self) -> None:
        """After the backward pass, before the optimiser's step."""
        self.pruner.observe()

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> PruneReport | None:
        """After the optimiser's step: keep zeros zero, and prune when it is time. Returns the report of a pruning."""
        self.step += 1
        self.pruner.enforce()
        return self.advance(optimizer)

    def advance(self, optimizer: torch.optim.Optimizer | None = None) -> PruneReport | None:
        """Prune if the schedule asks for more than there is at this step. A loop calls it once before the first step to
        prune at the very start."""
        wanted = sparsity_at(self._config.schedule, self.pruner.target, min(1.0, self.step / self.steps))
        if wanted <= self._reached + 1e-9:
            return None
        # Calibration has gradients of its own and must not touch those that the loop may be adding up.
        report = self.pruner.prune(wanted, self._batches, self._loss)
        self.pruner.enforce(optimizer)
        self._reached = wanted
        self.reports.append(report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """What the loop must keep to go on after an interruption."""
        return {"pruner": self.pruner.state_dict(), "step": self.step, "reached": self._reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state_dict`."""
        self.pruner.load_state_dict(state["pruner"])
        self.step, self._reached = int(state["step"]), float(state["reached"])


class PruningCallback(TrainerCallback):
    """The same for ``transformers.Trainer``.

    ``batches`` and ``loss`` as above; without them, calibration takes the trainer's own batches and the model's own
    ``loss`` output, which needs labels in the batches.
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
