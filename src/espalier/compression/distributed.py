"""Several processes on one job, as the standard launcher (torchrun) starts them.

Gradients are averaged explicitly rather than by DistributedDataParallel, which would rename the parameters that the
pruner knows. The networks are small: one message per step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from espalier.errors import ConfigError

_PATIENCE = timedelta(hours=4)
"""How long the others wait while the leader evaluates and exports."""


@dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size``, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def leader(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the leader."""
        if self.size == 1:
            return
        for tensor in tensors:
            # NCCL and gloo have no boolean broadcast in every version.
            buffer = tensor.to(self.device, torch.uint8) if tensor.dtype == torch.bool else tensor.detach()
            dist.broadcast(buffer, 0)
            if buffer is not tensor:
                tensor.detach().copy_(buffer)

    def agree(self, value: float) -> float:
        """The leader's value, in every process."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared.item())

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        shared = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item() > 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def world(device: torch.device | None = None) -> Iterator[World]:
    """The processes of this job; a single one unless a launcher has set RANK and WORLD_SIZE.

    Uses NCCL on GPUs, gloo on CPUs, or the group that exists already. Raises ConfigError for a launcher's variables
    that make no sense.
    """
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE, RANK and LOCAL_RANK must be numbers, as torchrun sets them: {error}") from error
    chosen = device or pick_device(local)
    if size == 1:
        yield World(0, 1, chosen)
        return
    own = not dist.is_initialized()
    if own:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield World(rank, size, chosen)
    finally:
        if own:
            dist.destroy_process_group()


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for key in state:
            yield from tensors_of(state[key])
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_of(value)
