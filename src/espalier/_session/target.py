"""Where a session runs what does not go to ONNX Runtime: on the CPU by the engine, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.compiler.packed import PackedProgram
from espalier.errors import InputError
from espalier.gpu.device import is_gpu
from espalier.passes.partition import NativeSegment

if TYPE_CHECKING:
    from espalier.gpu.scales import Calibration


@dataclass(frozen=True, kw_only=True)
class Target:
    """``device``, and for a GPU its ``precision`` and the file of FP8 scales, ``calibration``."""

    device: str = "cpu"
    precision: str | None = None
    calibration: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Raises InputError for an unknown device, or what the engine does not take."""
        if is_gpu(self.device):
            return
        if self.precision not in (None, "fp32"):
            raise InputError(
                f"precision {self.precision!r} needs a GPU (device='cuda'); a model runs on a CPU in float32, "
                "and in int8 where it is quantised"
            )
        if self.calibration is not None:
            raise InputError("a calibration is for FP8 on a GPU: pass device='cuda', or leave it out")

    @property
    def is_gpu(self) -> bool:
        """Whether native segments run in PyTorch instead of in the engine."""
        return is_gpu(self.device)

    @property
    def tolerance(self) -> float:
        """The largest error that the arithmetic explains, relative to the largest output (at least 1)."""
        if not self.is_gpu or self.precision == "fp32":
            return 2e-4
        return 0.2 if self.calibration is not None else 0.05

    def build(self, segments: Sequence[NativeSegment], *, threads: int, tune: bool) -> list[PackedProgram]:
        """Compile native segments. Raises what the compilers raise, and ModelFormatError for another model's scales."""
        if not self.is_gpu:
            from espalier import compiler

            return [
                compiler.build(step.graph, threads=threads, tune=tune, exact_padding=step.exact_padding)
                for step in segments
            ]
        from espalier import gpu

        scales = self._scales(segments)
        return [
            gpu.build(
                step.graph,
                device=self.device,
                precision=self.precision,
                calibration=scales,
                tune=tune,
                exact_padding=step.exact_padding,
            )
            for step in segments
        ]

    def _scales(self, segments: Sequence[NativeSegment]) -> Calibration | None:
        if self.calibration is None:
            return None
        from espalier.gpu.scales import Calibration, combined, fingerprint

        scales = Calibration.load(self.calibration)
        scales.check(combined(fingerprint(step.graph) for step in segments))
        return scales
