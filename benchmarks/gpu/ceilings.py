"""The two ceilings everything else is measured against: the rate of the matrix units and the memory's bandwidth.

    python benchmarks/gpu/ceilings.py

Matrix rates at a large square and at the shapes of BERT-Large's layers over 16,384 tokens: the second is what a layer
can hope for, and the gap between both is what its shape costs.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from common import MODELS, Run

from espalier.gpu.runtime import CpuRuntime, CudaRuntime, Runtime
from espalier.gpu.weights import Dense, Fp8, Semistructured, Weight


def runtime_of(run: Run) -> Runtime:
    """The device of the run."""
    return CpuRuntime() if run.smoke else CudaRuntime(torch.device(run.options.device))


def weight_of(kind: str, values: torch.Tensor) -> Weight:
    """A weight of float32 ``values`` as bf16 or fp8, dense or 2:4."""
    if kind.endswith("2:4"):
        values = values * torch.tensor([1.0, 1.0, 0.0, 0.0], device=values.device).repeat(values.shape[1] // 4)
    dense = Fp8.of(values, None, 0.02, torch.bfloat16) if kind.startswith("fp8") else Dense(values.bfloat16(), None)
    return Semistructured(dense) if kind.endswith("2:4") else dense


def matrix_rate(run: Run, kind: str, tokens: int, features: int, depth: int) -> dict[str, Any]:
    """A library's product of ``[tokens, depth]`` with ``[features, depth]``: 2 operations per weight and token."""
    runtime = runtime_of(run)
    weight = weight_of(kind, torch.randn(features, depth, device=runtime.device) * 0.04)
    x = torch.randn(tokens, depth, device=runtime.device)
    operand = (x / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn) if weight.reads_fp8 else x.bfloat16()
    seconds = runtime.seconds(lambda: weight.product(operand))
    return {"seconds": seconds, "tflops": 2 * tokens * features * depth / seconds / 1e12}


def bandwidth(run: Run, megabytes: int) -> dict[str, Any]:
    """Copying memory on the device: bytes read and written per second."""
    runtime = runtime_of(run)
    source = torch.zeros(megabytes << 18, device=runtime.device)
    target = torch.empty_like(source)
    seconds = runtime.seconds(lambda: target.copy_(source))
    return {"seconds": seconds, "gb_per_s": 2 * source.nbytes / seconds / 1e9}


def main(arguments: list[str] | None = None) -> int:
    run = Run("ceilings", __doc__, arguments)
    tokens, square, megabytes = (64, 64, 1) if run.smoke else (16384, 8192, 1024)
    run.row("bandwidth", partial(bandwidth, run, megabytes))
    model = MODELS["bert-large"]
    hidden, ffn = (32, 64) if run.smoke else (model.hidden, model.ffn)
    shapes = {
        "square": (square, square, square),
        "query, key, value": (tokens, 3 * hidden, hidden),
        "output": (tokens, hidden, hidden),
        "up": (tokens, ffn, hidden),
        "down": (tokens, hidden, ffn),
    }
    kinds = ["bf16", "fp8"] + ([] if run.smoke else ["bf16 2:4", "fp8 2:4"])
    for kind in kinds:
        for name, shape in shapes.items():
            run.row(f"{kind}/{name}", partial(matrix_rate, run, kind, *shape))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
