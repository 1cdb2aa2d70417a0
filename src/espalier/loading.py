"""How to load a model, as one value: what benchmarks, servers and MLPerf runs are told, and sessions are made by."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from espalier._cpu import usable_cores
from espalier.errors import InputError, InputTypeError
from espalier.gpu.device import LANES, is_gpu

if TYPE_CHECKING:
    from espalier.session import Model, Session

TOLERANCE_8_BITS = 0.2


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What :func:`espalier.load` takes besides the model, under the same names.

    Raises InputTypeError or InputError for threads that are no positive number, an unknown device, and what only a
    GPU takes.
    """

    threads: int | None = None
    tune: bool = True
    device: str = "cpu"
    precision: str | None = None
    calibration: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _check_threads(self.threads)
        if self.is_gpu:
            return
        if self.precision not in (None, "fp32"):
            raise InputError(
                f"precision {self.precision!r} needs a GPU (device='cuda'); a model runs on a CPU in float32, "
                "and in int8 where it is quantised"
            )
        if self.calibration is not None:
            raise InputError("a calibration is for FP8 on a GPU: pass device='cuda', or leave it out")

    @property
    def thread_count(self) -> int:
        """Threads of a run: as many as were asked for, else the cores the process may use."""
        return usable_cores() if self.threads is None else self.threads

    @property
    def is_gpu(self) -> bool:
        """Whether native segments run in PyTorch instead of in the engine."""
        return is_gpu(self.device)

    @property
    def lanes(self) -> int:
        """Batches that a loaded model works on at a time."""
        return LANES if self.is_gpu else 1

    @property
    def tolerance(self) -> float:
        """The largest error that the arithmetic explains, relative to the largest output (at least 1)."""
        if not self.is_gpu or self.precision == "fp32":
            return 2e-4
        return TOLERANCE_8_BITS if self.calibration is not None else 0.05

    def open(self, model: Model) -> Session:
        """Load ``model``. Raises what :func:`espalier.load` raises."""
        from espalier.session import load

        return load(model, **asdict(self))


def _check_threads(threads: int | None) -> None:
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise InputTypeError(f"threads must be a whole number or None; got {threads!r}")
    if threads < 1:
        raise InputError(f"threads must be at least 1; got {threads}: leave it out to use every core the process may")
