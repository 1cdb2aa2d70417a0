"""Triton kernels, run by Triton's interpreter on the CPU, against the eager operations they stand for."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads this when it is imported, so it has to be set for this module alone: see test_interpreted.py.
    pytest.skip("runs in a process of its own, by test_interpreted.py", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install 'espalier[gpu]'")

import torch

from espalier.gpu.batches import Shape, bucket, tiles_of
from espalier.gpu.form import FP8, Form
from espalier.gpu.kernels import attention, fused, gemm
from espalier.gpu.kernels.eager import EagerKernels
from espalier.gpu.weights import Dense, Fp8

EAGER = EagerKernels()
FORMS = [
    Form(torch.float32),
    Form(torch.bfloat16),
    Form(torch.float16),
    Form(torch.bfloat16, 0.02),
    Form(torch.bfloat16, 0.3, keep=False),
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def agree(got: fused.Result, want: fused.Result, form: Form, error: float = 2e-5) -> None:
    """Equal up to one rounding of each form."""
    for found, expected, step in zip(got, want, (torch.finfo(form.dtype).eps, torch.finfo(FP8).eps), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.dtype == expected.dtype
            a, b = found.float().numpy(), expected.float().numpy()
            np.testing.assert_allclose(
                a, b, rtol=step + error, atol=error * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
            )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 7), (5, 384), (2, 1000), (0, 16)])
@pytest.mark.parametrize("residual", [False, True])
def test_norm(form: Form, rows: int, features: int, residual: bool) -> None:
    x, more = random(rows, features, dtype=form.dtype), random(rows, features, seed=1, dtype=form.dtype)
    gamma, beta = random(features, seed=2), random(features, seed=3)
    operands = (x, more if residual else None, gamma, beta if residual else None, 1e-5, form)
    agree(fused.norm(*operands), EAGER.norm(*operands), form)


@pytest.mark.parametrize("spread", [1e-18, 1e-4, 1e4, 1e15])
def test_norm_at_extreme_scales(spread: float) -> None:
    form = Form(torch.float32, 0.01)
    operands = (random(4, 96, spread=spread), None, random(96, seed=1), None, 1e-12, form)
    agree(fused.norm(*operands), EAGER.norm(*operands), form)


def test_norm_of_rows_with_a_stride_and_of_nan() -> None:
    form = Form(torch.bfloat16, 0.1)
    wide = random(6, 3 * 32, dtype=torch.bfloat16)
    wide[2, 40] = float("nan")
    operands = (wide[:, 32:64], wide[:, 64:], random(32, seed=1), random(32, seed=2), 1e-5, form)
    agree(fused.norm(*operands), EAGER.norm(*operands), form)


@pytest.mark.parametrize("kind", sorted(fused.FUSED_ACTIVATIONS))
@pytest.mark.parametrize("form", FORMS[:1] + FORMS[3:], ids=str)
def test_unary(kind: str, form: Form) -> None:
    # Specials, and far into both tails.
    special = torch.tensor([[0.0, -0.0, 1e-30, 1e30, -1e30, float("inf"), float("nan")]])
    for x, bias in ((random(7, 33, spread=8), random(33, seed=1)), (special, None), (random(0, 5), None)):
        agree(fused.unary(x, bias, kind, form), EAGER.unary(x, bias, kind, form), form)


def test_e4m3_saturates_and_keeps_nan() -> None:
    x = torch.tensor([[1e9, -1e9, 448.0, 464.0, 2e-3, -1e-3, float("nan"), float("-inf")]])
    form = Form(torch.float32, 1.0, keep=False)
    _, quantized = fused.unary(x, None, "", form)
    _, wanted = EAGER.unary(x, None, "", form)
    assert quantized is not None
    assert wanted is not None
    np.testing.assert_array_equal(quantized.float().numpy(), wanted.float().numpy())


def batch_of(lengths: list[int], *, masked: bool = False, starts: list[int] | None = None) -> SimpleNamespace:
    """A device batch as far as attention and means look at it, with empty sequences at the end as buckets have."""
    sequences = bucket(len(lengths), 4)
    padded = np.array(lengths + [0] * (sequences - len(lengths)), np.int32)
    tokens = bucket(sum(lengths), 64)
    shape = Shape(tokens, sequences, 64, masked, False)
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(padded)]).astype(np.int32))
    key_bias = None
    if masked:
        key_bias = torch.where(random(tokens, seed=9) > 0.5, 0.0, torch.finfo(torch.float32).min)
        key_bias[: lengths[0]] = torch.finfo(torch.float32).min  # one sequence of padding alone
    return SimpleNamespace(
        shape=shape,
        bounds=bounds,
        starts=torch.tensor((starts or [0] * len(lengths)) + [0] * (sequences - len(lengths)), dtype=torch.int32),
        tiles=torch.from_numpy(tiles_of(np.array(lengths, np.int32), shape.tiles)),
        key_bias=key_bias,
        weights=None,
    )


def attend(lengths: list[int], heads: int, size: int, v_size: int, form: Form, **options: object) -> None:
    bias = options.pop("bias", None)
    batch = batch_of(lengths, **options)  # type: ignore[arg-type]
    tokens = batch.shape.tokens
    # Queries, keys and values as slices of one tensor, as a merged product gives them.
    merged = random(tokens, heads * (2 * size + v_size), dtype=form.dtype)
    q, k, v = merged.split([heads * size, heads * size, heads * v_size], dim=1)
    operands = (q, k, v, heads, 1 / size**0.5, batch, bias, form)
    used = sum(lengths)
    got, want = attention.attention(*operands), EAGER.attention(*operands)  # type: ignore[arg-type]
    loose = 2e-5 if form.dtype == torch.float32 else 1e-2  # probabilities are rounded to the type of the values
    agree(
        tuple(x if x is None else x[:used] for x in got),  # type: ignore[arg-type]
        tuple(x if x is None else x[:used] for x in want),  # type: ignore[arg-type]
        form,
        loose,
    )


@pytest.mark.parametrize("lengths", [[1], [64, 1, 65], [130, 7, 3, 3, 63]])
@pytest.mark.parametrize(("heads", "size", "v_size"), [(1, 16, 16), (3, 24, 40), (2, 64, 64)])
def test_attention(lengths: list[int], heads: int, size: int, v_size: int) -> None:
    attend(lengths, heads, size, v_size, Form(torch.float32))


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_attention_in_every_form(form: Form) -> None:
    attend([70, 5, 33], 2, 32, 32, form)


def test_attention_with_masked_keys_and_a_sequence_of_padding() -> None:
    attend([20, 70, 3], 2, 16, 16, Form(torch.float32), masked=True)


@pytest.mark.parametrize("shape", [(1, 2, 80, 80), (3, 1, 1, 80), (1, 1, 80, 1), (3, 2, 80, 80)])
def test_attention_with_a_bias(shape: tuple[int, ...]) -> None:
    bias = random(*shape, seed=5)
    attend([20, 70, 3], 2, 16, 16, Form(torch.float32), bias=bias, starts=[4, 10, 77], masked=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_segment_mean(weighted: bool) -> None:
    batch = batch_of([5, 1, 130])
    x = random(batch.shape.tokens, 300)
    batch.weights = torch.rand(len(x)) if weighted else None
    got = fused.segment_mean(x, batch.bounds, batch.weights, 1e-9)
    torch.testing.assert_close(got, EAGER.segment_mean(x, batch, 1e-9), rtol=1e-5, atol=1e-5)


SMALL = gemm.Tiling(32, 32, 32, 2, 4)


@pytest.mark.parametrize("kind", ["", "gelu", "relu"])
@pytest.mark.parametrize("form", [FORMS[1], FORMS[3], FORMS[4]], ids=str)
@pytest.mark.parametrize(("tokens", "features", "depth"), [(1, 16, 16), (70, 48, 80), (33, 112, 144)])
def test_persistent_gemm(kind: str, form: Form, tokens: int, features: int, depth: int) -> None:
    weight, bias = random(features, depth, seed=1), random(features, seed=2, dtype=torch.bfloat16)
    x = random(tokens, depth)
    fp8 = Fp8.of(weight, bias, 0.01, torch.bfloat16)
    half = Dense(weight.bfloat16(), bias)
    for chosen, operand, scale in ((fp8, (x / 0.01).clamp(-448, 448).to(FP8), fp8.factor), (half, x.bfloat16(), 1.0)):
        got = gemm.gemm(operand, chosen.values, bias, scale, kind, form, tiling=SMALL, programs=3)
        # Exact operands, so only the order of sums differs; the library rounds before the activation.
        product = operand.float() @ chosen.values.float().T * scale + bias.float()
        agree(got, EAGER.unary(product, None, kind, form), form, 2e-3)


def test_gemm_refuses_weights_that_its_copies_cannot_take() -> None:
    assert gemm.fits(torch.zeros(16, 32, dtype=FP8))
    assert not gemm.fits(torch.zeros(16, 24, dtype=FP8))
    assert not gemm.fits(torch.zeros(2, 32, dtype=FP8))
    assert not gemm.fits(torch.zeros(32, 16, dtype=FP8).T)
