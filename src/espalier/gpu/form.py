"""In which element types a result is wanted: the compute type, e4m3, or both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest finite e4m3 number."""

Result = tuple[torch.Tensor | None, torch.Tensor | None]
"""A value in the compute type and as e4m3; None for a form nobody reads."""


@dataclass(frozen=True)
class Form:
    """``dtype`` is the compute type, ``scale`` that of the e4m3 form (value = e4m3 number x scale), None for none.

    ``keep`` is False when only the e4m3 form is read.
    """

    dtype: torch.dtype
    scale: float | None = None
    keep: bool = True

    @property
    def inverse_scale(self) -> float:
        """What to multiply by before rounding to e4m3."""
        return 1.0 if self.scale is None else 1.0 / self.scale


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """``x / scale`` rounded to e4m3, saturating; NaN stays NaN."""
    return (x.float() * (1.0 / scale)).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def emit(x: torch.Tensor, form: Form) -> Result:
    """A float32 result in the forms that are wanted."""
    return x.to(form.dtype) if form.keep else None, None if form.scale is None else quantize(x, form.scale)


def empty_result(shape: tuple[int, int], device: torch.device, form: Form) -> Result:
    """Room for a result in the forms that are wanted, for a kernel to fill."""
    return (
        torch.empty(shape, dtype=form.dtype, device=device) if form.keep else None,
        None if form.scale is None else torch.empty(shape, dtype=FP8, device=device),
    )
