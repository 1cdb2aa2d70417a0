"""The executor of the native dialect on GPUs, in PyTorch and Triton: the same graphs behind the same session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.gpu.device import require_torch
from espalier.ir.graph import Graph

if TYPE_CHECKING:
    from espalier.gpu.program import GpuProgram
    from espalier.gpu.scales import Calibration


def build(
    graph: Graph,
    *,
    device: str,
    precision: str | None = None,
    calibration: Calibration | None = None,
    tune: bool = True,
    exact_padding: bool = False,
) -> GpuProgram:
    """Compile a graph of native nodes for a device; see :class:`~espalier.gpu.program.GpuProgram`.

    Raises MissingDependencyError without PyTorch or Triton, InputError for a device or precision that cannot be had,
    UnsupportedModelError when the executor cannot run the graph, GraphError when it is malformed.
    """
    require_torch()
    from espalier.gpu.program import GpuProgram

    return GpuProgram(
        graph, device=device, precision=precision, calibration=calibration, tune=tune, exact_padding=exact_padding
    )
