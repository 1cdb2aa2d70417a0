"""The operations with the kernels made for GPUs; where there are several, the one that measures best."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from espalier.errors import InputError, UnsupportedModelError
from espalier.gpu.batches import DeviceBatch
from espalier.gpu.device import Capabilities
from espalier.gpu.form import Form, Result
from espalier.gpu.kernels import attention as triton_attention
from espalier.gpu.kernels import fused, gemm, libraries
from espalier.gpu.kernels.eager import EagerKernels
from espalier.gpu.tuning import Choices
from espalier.gpu.weights import Dense, Fp8, Semistructured, Weight

ATTENTIONS = ("auto", "triton", "varlen", "flex")
_AGREEMENT = 0.02
"""Mean difference between two ways, relative to the mean result; the largest may be a step of the type more."""


class FastKernels(EagerKernels):
    """Triton kernels, PyTorch's libraries, and a choice between them per shape and bucket.

    ``attention`` is one of :data:`ATTENTIONS`: ``auto`` measures, the others name one. ``seconds`` times a call on the
    device.
    """

    def __init__(
        self,
        found: Capabilities,
        seconds: Callable[[Callable[[], Result]], float],
        *,
        tune: bool,
        attention: str = "auto",
    ) -> None:
        if attention not in ATTENTIONS:
            raise InputError(f"unknown attention {attention!r}; expected one of {', '.join(ATTENTIONS)}")
        self._found = found
        self._attention = attention
        # Triton's own errors, as of a kernel that needs more memory than a multiprocessor has, are of no other class.
        failures = (RuntimeError, ValueError, TritonError)
        self.choices: Choices[Result] = Choices(agree, seconds, tune=tune, failures=failures)

    def gemm(self, x: torch.Tensor, weight: Weight, activation: str, form: Form) -> Result:
        """By a library, or by the persistent kernel with everything in its epilogue."""
        dense = weight.dense if isinstance(weight, Semistructured) else weight
        candidates: dict[str, Callable[[], Result]] = {"library": partial(super().gemm, x, dense, activation, form)}
        if isinstance(weight, Semistructured):
            candidates["2:4"] = partial(super().gemm, x, weight, activation, form)
        candidates |= self._persistent(x, dense, activation, form)
        shape = (x.shape[0], *weight_shape(dense), x.dtype)
        return self.choices.run(
            ("gemm", shape, isinstance(weight, Semistructured), activation, form.keep, form.scale is None), candidates
        )

    def _persistent(
        self, x: torch.Tensor, weight: Weight, activation: str, form: Form
    ) -> dict[str, Callable[[], Result]]:
        if not isinstance(weight, Dense | Fp8) or not self._found.has("tma") or not gemm.fits(weight.values):
            return {}
        if activation not in fused.FUSED_ACTIVATIONS or not x.is_contiguous() or x.dtype == torch.float32:
            return {}
        fp8 = isinstance(weight, Fp8)
        scale = weight.factor if isinstance(weight, Fp8) else 1.0
        return {
            f"persistent {tiling.rows}x{tiling.columns}": partial(
                gemm.gemm, x, weight.values, weight.bias, scale, activation, form,
                tiling=tiling, programs=self._found.multiprocessors,
            )
            for tiling in (gemm.FP8_TILINGS if fp8 else gemm.HALF_TILINGS)
        }  # fmt: skip

    def unary(self, x: torch.Tensor, bias: torch.Tensor | None, kind: str, form: Form) -> Result:
        """One pass for the activations that the kernel knows."""
        if kind not in fused.FUSED_ACTIVATIONS or x.stride(1) != 1:
            return super().unary(x, bias, kind, form)
        return fused.unary(x, bias, kind, form)

    def norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor | None,
        epsilon: float,
        form: Form,
    ) -> Result:
        """One pass."""
        return fused.norm(x, residual, gamma, beta, epsilon, form)

    def segment_mean(self, x: torch.Tensor, batch: DeviceBatch, epsilon: float) -> torch.Tensor:
        """One pass, in order."""
        return fused.segment_mean(x, batch.bounds, batch.weights, epsilon)

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
        """Our kernel for everything with a bias or a mask; without, also PyTorch's."""
        ways: dict[str, Callable[[], Result]] = {
            "triton": partial(triton_attention.attention, q, k, v, heads, scale, batch, bias, form)
        }
        if bias is None and batch.key_bias is None and q.dtype != torch.float32 and q.shape == v.shape:
            if libraries.has_varlen():
                ways["varlen"] = partial(self._library, libraries.varlen, q, k, v, heads, scale, batch, form)
            if self._attention == "flex":
                ways["flex"] = partial(self._library, libraries.flex, q, k, v, heads, scale, batch, form)
        if self._attention != "auto":
            if self._attention not in ways:
                raise UnsupportedModelError(
                    f"attention {self._attention!r} cannot do this: it needs 16 bits, no mask and no bias, and varlen "
                    "PyTorch 2.11; leave the choice to the program"
                )
            return ways[self._attention]()

        def real(result: Result) -> Result:
            used = int(batch.bounds[-1])
            kept, quantized = (None if x is None else x[:used] for x in result)
            return kept, quantized

        key = ("attention", batch.shape, q.shape[1], heads, form.keep, form.scale is None)
        return self.choices.run(key, ways, real)

    def _library(
        self,
        function: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        scale: float,
        batch: DeviceBatch,
        form: Form,
    ) -> Result:
        """A library's attention, and a second pass where its result is wanted as e4m3."""
        mixed = function(q, k, v, heads, scale, batch)
        return (mixed, None) if form.scale is None else self.unary(mixed, None, "", form)


def weight_shape(weight: Weight) -> tuple[int, ...]:
    """``(M, K)``."""
    values: Any = weight.values  # type: ignore[attr-defined]
    return tuple(values.shape)


def agree(result: Result, reference: Result) -> bool:
    """Whether two results are the same but for rounding, in every form; NaN only in the same places."""
    return all(
        (got is None) == (want is None) and (got is None or want is None or _close(got, want))
        for got, want in zip(result, reference, strict=True)
    )


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    a, b = got.float(), want.float()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return False
    size = torch.where(finite, b, 0.0).abs()
    difference = torch.where(finite, a - b, 0.0).abs()
    # Sums in another order may round the other way: one step each, but of few numbers.
    step = torch.finfo(got.dtype).eps
    return bool((difference.max() <= (step + _AGREEMENT) * size.max()) & (difference.sum() <= _AGREEMENT * size.sum()))
