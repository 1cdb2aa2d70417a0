"""Calls of libraries that need a GPU: their arguments against the real signatures, their results with stand-ins."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch

from espalier.compiler.packed import PackedBatch
from espalier.gpu.batches import DeviceBatch, Layout, shape_of
from espalier.gpu.form import FP8, Form, quantize
from espalier.gpu.kernels import libraries
from espalier.gpu.kernels.eager import EagerKernels
from espalier.gpu.runtime import CudaRuntime
from espalier.gpu.weights import Dense, Fp8, Semistructured, is_semistructured

HEADS, WIDTH = 2, 32


def batch_of(*lengths: int) -> DeviceBatch:
    own = np.array(lengths, np.int32)
    batch = PackedBatch(own, np.zeros_like(own), own, int(own.max()), [], [], [], None, None)
    layout = Layout(shape_of(batch), columns=[], indices=0, floats=[])
    buffer = np.zeros(layout.size, np.int32)
    layout.fill(buffer, batch)
    return DeviceBatch.of(layout, torch.from_numpy(buffer))


def eager(q: Any, k: Any, v: Any, batch: DeviceBatch) -> Any:
    return EagerKernels().attention(q, k, v, HEADS, 0.25, batch, None, Form(torch.float32))[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_keeps_sequences_apart() -> None:
    batch = batch_of(3, 70, 20)
    q, k, v = torch.randn(batch.shape.tokens, 3 * WIDTH, generator=torch.Generator().manual_seed(0)).split(WIDTH, 1)
    found = libraries.flex(q, k, v, HEADS, 0.25, batch)
    torch.testing.assert_close(found[:93], eager(q, k, v, batch)[:93], rtol=1e-4, atol=1e-5)


def test_varlen_attention_is_called_as_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen", reason="this PyTorch has no varlen attention")
    if not libraries.has_varlen():
        pytest.skip("varlen attention takes no scale in this PyTorch")
    real = inspect.signature(module.varlen_attn)
    batch = batch_of(3, 70, 20)

    def stand_in(*given: Any, **options: Any) -> Any:
        bound = real.bind(*given, **options).arguments
        q, k, v = (bound[name].flatten(1) for name in ("query", "key", "value"))
        assert bound["query"].shape == (batch.shape.tokens, HEADS, WIDTH // HEADS)
        assert bound["cu_seq_q"].dtype == torch.int32
        assert bound["max_q"] == bound["max_k"] >= 70
        assert bound["scale"] == 0.25
        return eager(q, k, v, batch).unflatten(1, (HEADS, -1))

    monkeypatch.setattr(module, "varlen_attn", stand_in)
    q, k, v = torch.randn(batch.shape.tokens, 3 * WIDTH).split(WIDTH, 1)
    torch.testing.assert_close(libraries.varlen(q, k, v, HEADS, 0.25, batch), eager(q, k, v, batch))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("add_bias", [False, True])
def test_2_of_4_products_through_cusparselt(monkeypatch: pytest.MonkeyPatch, fp8: bool, add_bias: bool) -> None:
    names = {str(schema.name): schema for schema in torch._C._jit_get_schemas_for_operator("aten::_cslt_sparse_mm")}
    known = {argument.name for argument in names["aten::_cslt_sparse_mm"].arguments}

    def sparse_mm(packed: Any, dense: Any, **options: Any) -> Any:
        assert options.keys() <= known
        assert options.pop("transpose_result")
        y = packed.float() @ dense.float() * options.get("alpha", 1.0)
        bias = options.get("bias")
        return (y.T if bias is None else y.T + bias).to(options.get("out_dtype") or dense.dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm, raising=False)
    weight = torch.randn(48, 64) * torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(16)
    bias, x = torch.randn(48).bfloat16(), torch.randn(5, 64)
    assert is_semistructured(weight.numpy())
    dense = Fp8.of(weight, bias, 0.01, torch.bfloat16) if fp8 else Dense(weight.bfloat16(), bias)
    sparse = Semistructured(dense)
    assert sparse.reads_fp8 == fp8
    operand = quantize(x, 0.01) if fp8 else x.bfloat16()
    torch.testing.assert_close(
        sparse.product(operand, add_bias=add_bias), dense.product(operand, add_bias=add_bias), rtol=2e-2, atol=2e-2
    )


def test_fp8_products_are_asked_for_as_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.randn(32, 48), torch.randn(32).bfloat16()
    on_cpu = Fp8.of(weight, bias, 0.01, torch.bfloat16)
    on_gpu = Fp8(on_cpu.values, on_cpu.factor, on_cpu.scales, bias, torch.bfloat16, None)
    x = quantize(torch.randn(64, 48), 0.01)
    assert x.dtype == FP8
    found = on_gpu.product(x)  # the same operator exists for CPUs
    torch.testing.assert_close(found, on_cpu.product(x), rtol=2e-2, atol=2e-2)


def test_a_graph_is_captured_after_a_run_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    signature = inspect.signature(torch.cuda.graph.__init__)

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    class Stream:
        def synchronize(self) -> None:
            said.append("wait")

    @contextmanager
    def on(stream: Any) -> Any:
        said.append("on")
        yield

    @contextmanager
    def capture(*given: Any, **options: Any) -> Any:
        bound = signature.bind(None, *given, **options).arguments
        assert isinstance(bound["cuda_graph"], Graph)
        assert bound["stream"] is stream
        assert bound["pool"] == "pool"
        assert bound["capture_error_mode"] == "thread_local"
        said.append("capture")
        yield
        said.append("captured")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    stream = Stream()
    again = CudaRuntime(torch.device("cuda", 0)).capture(lambda: said.append("work"), stream, "pool")
    again()
    assert said == ["on", "work", "wait", "capture", "work", "captured", "replay"]
