"""Convolutions as the linear layers that they are: of what the kernel shows of each pixel.

The columns of such a layer's matrix go tap by tap, and within a tap channel by channel, as the engine has them: a 4x1
block is four outputs that share one tap of one channel, a 1x4 block four channels of one tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class Convolution(nn.Linear):
    """A 2-D convolution whose ``weight`` is ``[outputs, taps * channels]``; it computes what it did."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    _reversed_padding_repeated_twice: list[int]

    @staticmethod
    def convert(module: nn.Conv2d) -> Convolution:
        """Turn a convolution into this, in place: whoever holds it, or its parameters, holds the same object."""
        module.weight.data = module.weight.data.permute(0, 2, 3, 1).flatten(1).contiguous()
        module.__class__ = Convolution  # type: ignore[assignment]
        layer = cast(Convolution, module)
        layer.out_features, layer.in_features = layer.weight.shape
        return layer

    def revert(self) -> None:
        """Make it a convolution again, with the weights as they are."""
        self.weight.data = self._kernel(self.weight.data).contiguous()
        del self.in_features, self.out_features
        self.__class__ = nn.Conv2d  # type: ignore[assignment]

    def _kernel(self, weight: Tensor) -> Tensor:
        """``[outputs, channels, rows, columns]``."""
        return weight.view(self.out_channels, *self.kernel_size, self.in_channels).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._kernel(self.weight), self.bias, self.stride, self.padding, self.dilation)

    def rows(self, x: Tensor) -> Tensor:
        """What the kernel shows of each pixel of ``x`` ``[samples, channels, rows, columns]``: ``[samples, pixels,
        taps * channels]``."""
        padded = F.pad(x, self._reversed_padding_repeated_twice)
        taps = F.unfold(padded, self.kernel_size, self.dilation, 0, self.stride)
        by_channel = taps.view(len(x), self.in_channels, -1, taps.shape[2])
        return by_channel.permute(0, 3, 2, 1).flatten(2)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as what its matrix is multiplied with, ``[..., inputs]``."""
    return module.rows(x) if isinstance(module, Convolution) else x


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """A layer's output, or its gradient, as ``[..., outputs]``."""
    return y.flatten(2).transpose(1, 2) if isinstance(module, Convolution) else y


@contextmanager
def as_linear(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` with its convolutions as linear layers; those in groups, or padded with other than zeros, stay."""
    layers = [
        Convolution.convert(module)
        for module in model.modules()
        if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    ]
    try:
        yield model
    finally:
        for layer in layers:
            layer.revert()
