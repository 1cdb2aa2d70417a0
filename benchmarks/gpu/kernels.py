"""Every kernel on the device itself: held to the eager operation it stands for, then timed beside it.

    python benchmarks/gpu/kernels.py

At the shapes of BERT-Large, BERT-base and MiniLM over 16,384 tokens of SQuAD's lengths. A kernel that disagrees gets
`agrees: false` and no time. Attention is there three times: ours, PyTorch's varlen and FlexAttention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from ceilings import runtime_of
from common import MODELS, TINY, Encoder, Run, lengths_of

from espalier.compiler.packed import PackedBatch
from espalier.gpu.batches import DeviceBatch, Layout, shape_of, split
from espalier.gpu.form import FP8, Form, Result
from espalier.gpu.kernels.eager import EagerKernels
from espalier.gpu.weights import Dense, Fp8

EAGER = EagerKernels()
BOTH, FP8_ONLY, WIDE = Form(torch.bfloat16, 0.02), Form(torch.bfloat16, 0.02, keep=False), Form(torch.bfloat16)

Call = Callable[[], Result]


def compared(run: Run, kernel: Call, eager: Call, moved: float, operations: float = 0.0) -> dict[str, Any]:
    """Agreement first, then the time of both. ``moved``: bytes through memory; ``operations`` of the matrix units."""
    from espalier.gpu.kernels.fast import agree

    runtime = runtime_of(run)
    if not agree(kernel(), eager()):
        return {"agrees": False}
    seconds, eager_seconds = runtime.seconds(kernel), runtime.seconds(eager)
    return {
        "agrees": True,
        "seconds": seconds,
        "eager_seconds": eager_seconds,
        "gb_per_s": moved / seconds / 1e9,
        "tflops": operations / seconds / 1e12,
    }


def device_batch(run: Run, tokens: int) -> DeviceBatch:
    """A batch of SQuAD's lengths, its bucket nearly full."""
    lengths = lengths_of(run, 200)
    chosen = np.array([lengths[i] for i in split(lengths, tokens=tokens, sequences=1024)[-2]], np.int32)
    zeros = np.zeros(len(chosen), np.int32)
    batch = PackedBatch(chosen, zeros, chosen, int(chosen.max()), [], [], [], None, None)
    layout = Layout(shape_of(batch), columns=[], indices=0, floats=[])
    buffer = np.zeros(layout.size, np.int32)
    layout.fill(buffer, batch)
    return DeviceBatch.of(layout, torch.from_numpy(buffer).to(runtime_of(run).device))


def cases(run: Run, shape: Encoder, tokens: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Rows by name; each makes its operands when it is its turn."""
    from espalier.gpu.kernels import attention, fused, gemm, libraries

    device = runtime_of(run).device

    def random(*extents: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(extents, device=device).to(dtype)

    def norm() -> dict[str, Any]:
        x, more = random(tokens, shape.hidden), random(tokens, shape.hidden)
        gamma, beta = random(shape.hidden, dtype=torch.float32), random(shape.hidden, dtype=torch.float32)
        operands = (x, more, gamma, beta, 1e-12, BOTH)
        return compared(run, lambda: fused.norm(*operands), lambda: EAGER.norm(*operands), tokens * shape.hidden * 7.0)

    def gelu() -> dict[str, Any]:
        operands = (random(tokens, shape.ffn), random(shape.ffn), "gelu", FP8_ONLY)
        return compared(run, lambda: fused.unary(*operands), lambda: EAGER.unary(*operands), tokens * shape.ffn * 3.0)

    def product(kind: str, tiling: Any, rows: int, depth: int, activation: str, form: Form) -> dict[str, Any]:
        values, bias, x = random(rows, depth, dtype=torch.float32) * 0.04, random(rows), random(tokens, depth)
        weight = Fp8.of(values, bias, 0.02, torch.bfloat16) if kind == "fp8" else Dense(values.bfloat16(), bias)
        operand = (x.float() / 0.02).clamp(-448, 448).to(FP8) if kind == "fp8" else x
        scale = weight.factor if isinstance(weight, Fp8) else 1.0
        options = {"tiling": tiling, "programs": max(1, run.found.multiprocessors)}
        return compared(
            run,
            lambda: gemm.gemm(operand, weight.values, bias, scale, activation, form, **options),
            lambda: EAGER.gemm(operand, weight, activation, form),
            float(operand.nbytes + weight.values.nbytes + tokens * rows),
            2.0 * tokens * rows * depth,
        )

    def attend(way: str) -> dict[str, Any]:
        batch = device_batch(run, tokens)
        width = shape.heads * shape.head_size
        q, k, v = random(batch.shape.tokens, 3 * width).split(width, dim=1)
        scale, used = shape.head_size**-0.5, int(batch.bounds[-1])
        ways: dict[str, Callable[[], torch.Tensor | None]] = {
            "triton": lambda: attention.attention(q, k, v, shape.heads, scale, batch, None, WIDE)[0],
            "varlen": lambda: libraries.varlen(q, k, v, shape.heads, scale, batch),
            "flex": lambda: libraries.flex(q, k, v, shape.heads, scale, batch),
        }

        def real(mixed: torch.Tensor | None) -> Result:
            return (None if mixed is None else mixed[:used]), None

        lengths = batch.bounds.diff().double()
        return compared(
            run,
            lambda: real(ways[way]()),
            lambda: real(EAGER.attention(q, k, v, shape.heads, scale, batch, None, WIDE)[0]),
            4.0 * used * width * 2,
            float(4 * width * lengths.square().sum()),
        )

    found: dict[str, Callable[[], dict[str, Any]]] = {"norm": norm, "gelu": gelu}
    small = gemm.Tiling(32, 32, 32, 2, 4)
    for kind, tilings in (("fp8", gemm.FP8_TILINGS), ("bf16", gemm.HALF_TILINGS)):
        for tiling in (small,) if run.smoke else tilings:
            name = f"gemm {kind} {tiling.rows}x{tiling.columns}"
            found[f"{name} up"] = partial(product, kind, tiling, shape.ffn, shape.hidden, "gelu", FP8_ONLY)
            found[f"{name} down"] = partial(product, kind, tiling, shape.hidden, shape.ffn, "", WIDE)
    found |= {
        f"attention {way}": partial(attend, way) for way in (("triton",) if run.smoke else ("triton", "varlen", "flex"))
    }
    return found


def main(arguments: list[str] | None = None) -> int:
    run = Run("kernels", __doc__, arguments)
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is not installed, so there is no kernel to run: pip install 'espalier[gpu]'", file=sys.stderr)
        return 0 if run.smoke else 1
    for model in ("bert-large", "bert-base", "minilm"):
        shape, tokens = (TINY, 128) if run.smoke else (MODELS[model], 16384)
        for name, case in cases(run, shape, tokens).items():
            run.row(f"{model}/{name}", case)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
