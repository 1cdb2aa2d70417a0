"""The operations of an executor in plain PyTorch: what they mean, on any device, one after another.

The kernels made for a GPU derive from these and are held to them. Everything is computed in float32 and rounded once,
to the forms that are wanted. ``x`` is ``[rows, F]`` throughout, rows being tokens or sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from espalier.gpu.batches import DeviceBatch
from espalier.gpu.form import Form, Result, emit
from espalier.gpu.weights import Weight

Function = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Function] = {
    "": lambda x: x,
    # Not torch.nn.functional.gelu, which makes NaN of infinity on a CPU.
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "erf": torch.erf,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "softplus": lambda x: torch.logaddexp(x, x.new_zeros(())),
    "elu": torch.nn.functional.elu,
}
"""Elementwise functions on float32 by the ``kind`` of Activation; "" is the identity."""


class EagerKernels:
    """One method per operation that has a kernel of its own somewhere."""

    def gemm(self, x: torch.Tensor, weight: Weight, activation: str, form: Form) -> Result:
        """``activation(x @ W.T + bias)``; ``x`` in the form that the weight reads."""
        if not activation and form.scale is None:
            return weight.product(x), None
        return self.unary(weight.product(x, add_bias=False), weight.bias, activation, form)

    def unary(self, x: torch.Tensor, bias: torch.Tensor | None, kind: str, form: Form) -> Result:
        """``activation(x + bias)``; ``bias`` ``[F]`` or None."""
        wide = x.float()
        return emit(ACTIVATIONS[kind](wide if bias is None else wide + bias), form)

    def norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor | None,
        epsilon: float,
        form: Form,
    ) -> Result:
        """``LayerNorm(x + residual)``; ``gamma``, ``beta`` float32 ``[F]``."""
        wide = x.float() if residual is None else x.float() + residual.float()
        return emit(torch.nn.functional.layer_norm(wide, wide.shape[-1:], gamma, beta, epsilon), form)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        scale: float,
        batch: DeviceBatch,
        bias: torch.Tensor | None,
        form: Form,
    ) -> Result:
        """``softmax(scale q k^T + biases) v`` within each sequence; ``q``, ``k`` ``[T, H*D]``, ``v`` ``[T, H*Dv]``.

        ``bias`` is float32 ``[B or 1, H or 1, S or 1, S or 1]``, in the columns of the padded batch.
        """
        out = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        bounds, starts = batch.bounds.tolist(), batch.starts.tolist()
        for sequence, (first, last, start) in enumerate(zip(bounds[:-1], bounds[1:], starts, strict=True)):
            if first == last:
                continue  # sequences that fill up a bucket
            rows = slice(first, last)
            queries, keys, values = (_heads(x[rows], heads) for x in (q, k, v))
            scores = queries @ keys.transpose(1, 2) * scale
            if bias is not None:
                scores = scores + _window(bias, sequence, start, last - first)
            if batch.key_bias is not None:
                scores = scores + batch.key_bias[rows]
            mixed = torch.softmax(scores, dim=-1) @ values
            out[rows] = mixed.transpose(0, 1).flatten(1)
        return emit(out, form)

    def segment_mean(self, x: torch.Tensor, batch: DeviceBatch, epsilon: float) -> torch.Tensor:
        """Mean over each sequence's tokens, by their weights: ``[T, F]`` to ``[B, F]``."""
        weights = x.new_ones(len(x), dtype=torch.float32) if batch.weights is None else batch.weights
        bounds = batch.bounds.tolist()
        means = [
            (x[first:last].float() * weights[first:last, None]).sum(0) / weights[first:last].sum().clamp(min=epsilon)
            for first, last in pairwise(bounds)
        ]
        return torch.stack(means).to(x.dtype)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[S, H*D]`` as float32 ``[H, S, D]``."""
    return x.float().reshape(len(x), heads, x.shape[1] // heads).transpose(0, 1)


def _window(bias: torch.Tensor, sequence: int, start: int, length: int) -> torch.Tensor:
    """The part of a padded batch's bias that concerns one sequence: ``[H or 1, length or 1, length or 1]``."""
    own = bias[sequence if bias.shape[0] > 1 else 0]
    return own[
        :,
        slice(start, start + length) if own.shape[1] > 1 else slice(None),
        slice(start, start + length) if own.shape[2] > 1 else slice(None),
    ]


def normalise(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``x / max(norm, epsilon)`` over the last axis; the norm is computed so that it does not overflow."""
    wide = x.double()
    return (wide / wide.square().sum(-1, keepdim=True).sqrt().clamp(min=epsilon)).to(x.dtype)
