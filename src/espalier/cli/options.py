"""The options of loading a model, which several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F")


def _option(*names: str, **settings: Any) -> Callable[[F], F]:
    decorate: Any = click.option(*names, **settings)

    def option(command: F) -> F:
        decorated: F = decorate(command)
        return decorated

    return option


threads_option = _option(
    "--threads", type=click.IntRange(min=1), help="Threads to run on.  [default: the cores this process may use]"
)
"""``--threads``, as ``threads``."""

tune_option = _option(
    "--no-tune", is_flag=True, help="Choose weight formats by the cost model instead of by measurement."
)
"""``--no-tune``, as ``no_tune``."""

_device_option = _option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or torch-cpu to check.")
_precision_option = _option(
    "--precision", help="On a GPU: fp32, fp16, bf16 or fp8.  [default: bf16, or fp8 if calibrated]"
)
_calibration_option = _option(
    "--calibration", type=click.Path(path_type=Path), help="FP8 scales from `espalier calibrate`, for a GPU."
)


def target_options(command: F) -> F:
    """``--device``, ``--precision`` and ``--calibration``: where a model runs, as :func:`espalier.load` takes them."""
    return _device_option(_precision_option(_calibration_option(command)))


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All that :func:`espalier.load` takes, given to the command as ``load``, a LoadSettings."""

    @functools.wraps(command)
    def collected(
        *arguments: Any,
        threads: int | None,
        no_tune: bool,
        device: str,
        precision: str | None,
        calibration: Path | None,
        **others: Any,
    ) -> Any:
        from espalier.loading import LoadSettings

        load = LoadSettings(
            threads=threads, tune=not no_tune, device=device, precision=precision, calibration=calibration
        )
        return command(*arguments, load=load, **others)

    return threads_option(tune_option(target_options(collected)))
