"""Pruning, quantisation and distillation with PyTorch. The verb is :func:`espalier.compress`.

Group (what is zeroed together) x score (which groups go) x allocation (how many of each layer) x schedule (when) x
recovery (how the rest heals), each one class or function and one row in a table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.compression.callbacks import PruningCallback
    from espalier.compression.compress import Data
    from espalier.compression.config import Calibration, Config, Quantization, Recovery, Schedule, Training
    from espalier.compression.hook import PruningHook
    from espalier.compression.pruner import Pruner, PruneReport
    from espalier.compression.report import CompressionReport
    from espalier.compression.tasks.base import Columns

_HOMES = {
    "Calibration": "config",
    "Columns": "tasks.base",
    "CompressionReport": "report",
    "Config": "config",
    "Data": "compress",
    "PruneReport": "pruner",
    "Pruner": "pruner",
    "PruningCallback": "callbacks",
    "PruningHook": "hook",
    "Quantization": "config",
    "Recovery": "config",
    "Schedule": "config",
    "Training": "config",
}

__all__ = [
    "Calibration",
    "Columns",
    "CompressionReport",
    "Config",
    "Data",
    "PruneReport",
    "Pruner",
    "PruningCallback",
    "PruningHook",
    "Quantization",
    "Recovery",
    "Schedule",
    "Training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
