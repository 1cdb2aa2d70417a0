"""Compiling what does not go to ONNX Runtime: for the CPU by the engine, or for a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.compiler.packed import PackedProgram
from espalier.loading import LoadSettings
from espalier.passes.partition import NativeSegment

if TYPE_CHECKING:
    from espalier.gpu.scales import Calibration


def build(segments: Sequence[NativeSegment], settings: LoadSettings) -> list[PackedProgram]:
    """Compile native segments. Raises what the compilers raise, and ModelFormatError for another model's scales."""
    if not settings.is_gpu:
        from espalier import compiler

        return [
            compiler.build(
                segment.graph,
                threads=settings.thread_count,
                tune=settings.tune,
                exact_padding=segment.exact_padding,
            )
            for segment in segments
        ]
    from espalier import gpu

    scales = None if settings.calibration is None else _scales(settings.calibration, segments)
    return [
        gpu.build(
            segment.graph,
            device=settings.device,
            precision=settings.precision,
            calibration=scales,
            tune=settings.tune,
            exact_padding=segment.exact_padding,
        )
        for segment in segments
    ]


def _scales(path: str | os.PathLike[str], segments: Sequence[NativeSegment]) -> Calibration:
    from espalier.gpu.scales import Calibration, combined, fingerprint

    scales = Calibration.load(path)
    scales.check(combined(fingerprint(segment.graph) for segment in segments))
    return scales
