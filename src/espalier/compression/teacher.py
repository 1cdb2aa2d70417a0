"""The dense model's side of distillation: run for every batch, or once for all when what it says is small."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compression.recovery import Plan
from espalier.compression.tasks.base import EncoderTask, Outputs
from espalier.data import Batch

_MOST_BYTES = 2 << 30
"""Memory that the kept outputs of the dense model may take."""
_MOST_TIME = 0.1
"""Share of a run limited by time that running the dense model over all data beforehand may take."""
_FILL = -1e4


class Teacher:
    """``model`` is put in evaluation mode and gets no gradients. ``precision`` is for its forward passes."""

    def __init__(
        self, model: nn.Module, task: EncoderTask, plan: Plan, *, device: torch.device, precision: torch.dtype
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.task = task
        self.plan = plan
        self.device = device
        self.precision = precision
        self._kept: list[dict[str, Tensor]] | None = None

    @property
    def cached(self) -> bool:
        """Whether :meth:`outputs` looks up instead of computing."""
        return self._kept is not None

    def outputs(self, batch: Batch) -> Outputs:
        """What the dense model says about a batch of the training data."""
        return self._run(batch) if self._kept is None else self._look_up(batch, self._kept)

    def worth_caching(self, *, budget: int, epochs: float | None, seconds: float | None) -> bool:
        """Whether computing everything beforehand pays: the part is small, and each example is met at least twice.

        ``epochs`` planned, or ``seconds`` planned; a run planned in seconds is judged by timing one batch.
        """
        if not self.plan.compact or self._bytes() > _MOST_BYTES:
            return False
        if epochs is not None:
            return epochs >= 2
        if seconds is None:
            return False
        keys = self.task.fixed_batches(budget)
        middle = keys[len(keys) // 2]
        start = time.perf_counter()
        self._run(self.task.batch(middle).to(self.device))
        spent = time.perf_counter() - start
        return spent * len(keys) <= _MOST_TIME * seconds

    def fill(self, budget: int) -> None:
        """Compute and keep the outputs of all training data. The same data give the same bits on every call."""
        kept: list[dict[str, Tensor]] = [{} for _ in self.task.training]
        for key in self.task.fixed_batches(budget):
            batch = self.task.batch(key).to(self.device)
            outputs = self._run(batch)
            for place, row in enumerate(key):
                length = len(self.task.training[row].ids)
                for name, scores in outputs.logits.items():
                    own = scores[place, :length] if self.task.scores_tokens else scores[place]
                    kept[row][name] = own.cpu().clone()
                if outputs.embedding is not None:
                    kept[row]["embedding"] = outputs.embedding[place].cpu().clone()
        self._kept = kept

    def _run(self, batch: Batch) -> Outputs:
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16),
        ):
            return self.task.outputs(self.model, batch, self.plan.wants)

    def _look_up(self, batch: Batch, kept: list[dict[str, Tensor]]) -> Outputs:
        rows = [kept[row] for row in batch.rows]
        width = batch.mask.shape[1]
        found: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name != "embedding" and self.task.scores_tokens:
                shape = (len(values), width, *values[0].shape[1:])
                padded = torch.full(shape, _FILL)
                for place, value in enumerate(values):
                    padded[place, : len(value)] = value
                found[name] = padded
            else:
                found[name] = torch.stack(values)
        found = {name: tensor.to(self.device) for name, tensor in found.items()}
        embedding = found.pop("embedding", None)
        return Outputs(found, (), embedding)

    def _bytes(self) -> int:
        batch = self.task.batch(np.array([int(self.task.lengths.argmax())])).to(self.device)
        outputs = self._run(batch)
        parts = [*outputs.logits.values(), *([] if outputs.embedding is None else [outputs.embedding])]
        per_longest = sum(tensor.numel() for tensor in parts) * 4
        share = float(self.task.lengths.mean() / self.task.lengths.max()) if self.task.scores_tokens else 1.0
        return int(per_longest * share * len(self.task.training))
