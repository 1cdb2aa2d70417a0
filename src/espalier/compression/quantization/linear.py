"""Linear layers that compute with 8 bit numbers, in floats: what the engine will do with integers.

The arithmetic is that of the native dialect's ``QLinear`` (``espalier.ir.ops``), up to the rounding of float sums.
Gradients pass straight through the rounding, and stop where a value is clipped (Bengio et al. 2013, arXiv 1308.3432;
Jacob et al. 2018, arXiv 1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import TrainingError, UnsupportedModelError

LOW, HIGH = -128, 127
"""Integers of inputs. Those of weights leave out the lowest: their range is symmetric."""
STATIC, TOKEN = "static", "token"
"""How inputs are quantised: with one scale and zero point from calibration, or each token with its own."""


class _Rounded(torch.autograd.Function):
    """``(q - zero) * scale`` with ``q = clamp(round_half_even(x / scale) + zero, low, high)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = torch.round(x / scale).add_(zero)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return steps.clamp_(low, high).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None


_rounded = cast(Callable[..., Tensor], _Rounded.apply)


def round_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``x`` rounded with one ``scale`` float32 ``[1]`` and ``zero`` int8 ``[1]``; float32."""
    return _rounded(x.float(), scale, zero.float(), LOW, HIGH)


def round_tokens(x: Tensor) -> Tensor:
    """``x`` ``[..., features]`` rounded, each token over its own range extended to hold 0, in 255 steps; float32."""
    x = x.float()
    low = x.detach().amin(-1, keepdim=True).clamp(max=0)
    scale = (x.detach().amax(-1, keepdim=True).clamp(min=0) - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    return _rounded(x, scale, torch.round(-low / scale).clamp(0, 255), 0, 255)


def row_scales(weight: Tensor) -> Tensor:
    """float32 ``[outputs, 1]``: the largest magnitude of each row over 127; 1 for a row of zeros.

    Raises TrainingError for a weight that is no finite number.
    """
    most = weight.detach().float().abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(most).all()):
        raise TrainingError("a weight to quantise is not a finite number; check the model")
    scale = most / HIGH
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


class QuantizedLinear(nn.Linear):
    """A linear layer that rounds its weight and its input to 8 bits. ``weight`` stays float, and can be trained.

    Buffers, named as in checkpoints of compressed-tensors: ``weight_scale`` ``[outputs, 1]`` and, for static inputs,
    ``input_scale`` ``[1]`` and ``input_zero_point`` int8 ``[1]``. With ``active`` False the layer is a plain one.
    """

    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    active: bool

    @staticmethod
    def convert(module: nn.Linear, activations: str) -> QuantizedLinear:
        """Make a layer quantised, in place: whoever holds it, or its parameters, holds the same object afterwards.

        ``activations`` STATIC or TOKEN; a static layer needs :meth:`set_input` before it can run. Raises
        UnsupportedModelError for a subclass of nn.Linear, which may compute something else.
        """
        if type(module) not in (nn.Linear, QuantizedLinear):
            raise UnsupportedModelError(f"only nn.Linear can be quantised, got {type(module).__name__}; keep it float")
        module.__class__ = QuantizedLinear
        layer = cast(QuantizedLinear, module)
        device = layer.weight.device
        static = activations == STATIC
        layer.register_buffer("weight_scale", row_scales(layer.weight))
        layer.register_buffer("input_scale", torch.ones(1, device=device) if static else None)
        layer.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int8, device=device) if static else None)
        layer.active = True
        return layer

    def revert(self) -> None:
        """Make it a plain layer again, with the weights as they are."""
        for name in ("weight_scale", "input_scale", "input_zero_point"):
            del self._buffers[name]
        del self.active
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def activations(self) -> str:
        """STATIC or TOKEN."""
        return TOKEN if self.input_scale is None else STATIC

    def set_input(self, scale: Tensor, zero: Tensor) -> None:
        """Parameters of static inputs, ``[1]`` each."""
        device = self.weight.device
        # Copies: layers that read one tensor have equal parameters, not shared ones.
        self.input_scale, self.input_zero_point = scale.to(device, copy=True), zero.to(device, copy=True)

    def integers(self) -> Tensor:
        """The weight as it will be stored: int8 ``[outputs, inputs]``."""
        steps = torch.round(self.weight.detach().float() / self.weight_scale)
        return steps.clamp(-HIGH, HIGH).to(torch.int8)

    def rounded_weight(self) -> Tensor:
        """The weight as the layer uses it, float32."""
        return _rounded(self.weight.float(), self.weight_scale, torch.zeros_like(self.weight_scale), -HIGH, HIGH)

    def rounded_input(self, x: Tensor) -> Tensor:
        """The input as the layer uses it, float32."""
        if self.input_scale is None or self.input_zero_point is None:
            return round_tokens(x)
        return round_static(x, self.input_scale, self.input_zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        return F.linear(self.rounded_input(x), self.rounded_weight(), self.bias)

    def follow(self) -> None:
        """Let the scales grow with weights that training has made larger than they can hold."""
        grown = torch.where((self.weight != 0).any(1, True), row_scales(self.weight), 0.0)
        torch.maximum(self.weight_scale, grown, out=self.weight_scale)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """``model`` with its quantised layers computing in floats."""
    layers = list(quantized_layers(model).values())
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
