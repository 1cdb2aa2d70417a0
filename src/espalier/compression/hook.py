"""Pruning inside other people's training loops.

    hook = PruningHook(model, Config(sparsity=0.8), steps=len(loader) * epochs, batches=batches, loss=loss)

    loss(model, batch).backward()
    hook.before_step()
    optimizer.step()
    hook.after_step(optimizer)

Making the hook and calling it before and after the optimiser's step is all that a loop needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compression.config import Config
from espalier.compression.pruner import Pruner, PruneReport
from espalier.compression.schedules import sparsity_at
from espalier.errors import ConfigError


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
