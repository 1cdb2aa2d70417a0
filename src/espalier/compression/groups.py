"""What becomes zero together inside one weight matrix ``[outputs, inputs]``.

A pattern is data: a block of ``rows`` by ``columns``, and how many of every ``window`` inputs must stay.
Heads, neurons and layers span several matrices; :mod:`espalier.compression.structured` maps them onto columns of one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

PATTERNS = ("unstructured", "RxC (e.g. 4x1, 1x4)", "N:M (e.g. 2:4)", "heads", "neurons", "layers")
STRUCTURED = ("heads", "neurons", "layers")

_BLOCK = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_WINDOW = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Blocks of ``rows`` outputs by ``columns`` inputs; with ``window`` at least ``keep`` of so many neighbours
    stay."""

    pattern: str
    rows: int = 1
    columns: int = 1
    keep: int = 0
    window: int = 0

    @property
    def size(self) -> int:
        """Weights in a group."""
        return self.rows * self.columns

    @property
    def most(self) -> float:
        """The highest sparsity the pattern allows."""
        return 1 - self.keep / self.window if self.window else 1.0

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises ConfigError when the pattern does not divide a matrix ``[outputs, inputs]``."""
        outputs, inputs = shape
        step = self.window or self.columns
        if outputs % self.rows or inputs % step:
            raise ConfigError(
                f"pattern {self.pattern} does not divide the layer {name!r} of {outputs} outputs and {inputs} inputs; "
                f"expected multiples of {self.rows} and {step}: choose another pattern, or exclude the layer"
            )

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Groups along outputs and inputs."""
        return shape[0] // self.rows, shape[1] // self.columns

    def reduce(self, scores: Tensor) -> Tensor:
        """Sums over groups: ``[outputs, inputs]`` to ``[group rows, group columns]``."""
        down, across = self.grid((scores.shape[0], scores.shape[1]))
        return scores.reshape(down, self.rows, across, self.columns).sum((1, 3))

    def expand(self, groups: Tensor) -> Tensor:
        """The reverse of :meth:`reduce` for masks: every weight gets the value of its group."""
        return groups.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def count(self, sparsity: float, shape: tuple[int, int]) -> int:
        """How many groups of a matrix must go for ``sparsity``; the nearest number that the pattern allows."""
        down, across = self.grid(shape)
        return min(round(sparsity * down * across), round(self.most * down * across))

    def select(self, scores: Tensor, count: int, kept: Tensor) -> Tensor:
        """A mask ``[group rows, group columns]``, True for groups that stay, with ``count`` groups gone.

        Those go that have the lowest scores; what is gone in ``kept`` stays gone, and where the pattern has windows the
        best ``keep`` of each stay. Equal scores go in order of position, so that the choice is the same everywhere.
        """
        import torch

        ranked = scores.masked_fill(~kept, -torch.inf)
        if self.window:
            down, across = ranked.shape
            windows = ranked.reshape(down, across // self.window, self.window)
            best = windows.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
            sheltered = torch.zeros_like(windows, dtype=torch.bool).scatter_(-1, best, True).reshape(down, across)
            ranked = ranked.masked_fill(sheltered & kept, torch.inf)
        order = ranked.flatten().argsort(stable=True)[:count]
        mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[order] = False
        return mask.reshape(scores.shape) & kept


def parse_pattern(pattern: str) -> Groups:
    """The groups of a pattern's name. Raises ConfigError for one that does not exist or keeps everything."""
    if pattern in STRUCTURED or pattern == "unstructured":
        return Groups(pattern=pattern)
    if match := _BLOCK.fullmatch(pattern):
        return Groups(pattern=pattern, rows=int(match[1]), columns=int(match[2]))
    if match := _WINDOW.fullmatch(pattern):
        keep, window = int(match[1]), int(match[2])
        if keep >= window:
            raise ConfigError(
                f"pattern {pattern} keeps {keep} of {window} weights; the first number must be the smaller"
            )
        return Groups(pattern=pattern, keep=keep, window=window)
    raise ConfigError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
