"""What a run tells while it goes on. A monitor decides what to show; the trainer only reports."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_EVERY = 30.0
"""Seconds between two lines where no terminal shows a bar."""


@dataclass(frozen=True)
class Status:
    """Where a run stands. ``fraction`` of training done, 0 to 1; ``eta`` in seconds, None before it can be told."""

    step: int
    fraction: float
    loss: float
    sparsity: float
    learning_rate: float
    tokens_per_second: float
    eta: float | None

    def __str__(self) -> str:
        eta = "" if self.eta is None else f", {duration(self.eta)} left"
        return (
            f"step {self.step} ({self.fraction:.0%}): loss {self.loss:.4f}, sparsity {self.sparsity:.1%}, "
            f"{self.tokens_per_second:.0f} tokens/s{eta}"
        )


class Monitor:
    """Shows nothing. Subclasses override what they show."""

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def step(self, status: Status) -> None:
        """One optimiser step is done."""

    def say(self, text: str) -> None:
        """A line worth keeping."""


class Lines(Monitor):
    """Lines on stderr, at most one for steps every half minute: for logs."""

    def __init__(self) -> None:
        self._last = -_EVERY

    def stage(self, text: str) -> None:
        self.say(text)

    def step(self, status: Status) -> None:
        now = time.monotonic()
        if now - self._last >= _EVERY:
            self._last = now
            self.say(str(status))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar(Monitor):
    """A bar on the terminal with loss, sparsity and the time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: int = 0

    def __enter__(self) -> Monitor:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        self._task = self._progress.add_task("starting", total=1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def stage(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=text)  # type: ignore[arg-type]

    def step(self, status: Status) -> None:
        if self._progress is not None:
            eta = "" if status.eta is None else f", {duration(status.eta)} left"
            text = f"loss {status.loss:.4f}, sparsity {status.sparsity:.1%}, {status.tokens_per_second:.0f} tok/s{eta}"
            self._progress.update(self._task, description=text, completed=status.fraction)  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def monitor() -> Monitor:
    """A bar where a person watches, lines where not."""
    return Bar() if sys.stderr.isatty() else Lines()


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
