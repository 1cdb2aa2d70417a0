"""Compiles every kernel to machine code for GPUs that need not be here; prints a line of JSON for each.

    python tests/gpu/compile_kernels.py

Run by test_compiled.py in a process without the interpreter.
"""

from __future__ import annotations

import json
from typing import Any

from triton import compile as to_machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from espalier.gpu.batches import TILE
from espalier.gpu.kernels import attention, fused, gemm

HOPPER, AMPERE = 90, 80
INTEGERS = {
    "x_stride", "residual_stride", "features", "total", "q_stride", "k_stride", "v_stride", "out_stride", "bias_batch",
    "bias_head", "bias_query", "bias_key", "tokens", "depth",
}  # fmt: skip
NUMBERS = {"epsilon", "scale", "inverse_scale"}
POINTERS = {"bounds": "*i32", "tiles": "*i32", "starts": "*i32", "key_bias": "*fp32", "weights": "*fp32",
            "gamma": "*fp32", "beta": "*fp32", "out8": "*fp8e4nv"}  # fmt: skip


def build(kernel: Any, constants: dict[str, Any], capability: int, types: dict[str, str], **options: int) -> None:
    """Compile one specialisation: strides and extents multiples of 16, as real ones are."""
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            fixed[(place,)] = constants[name]
            continue
        default = "i32" if name in INTEGERS else "fp32" if name in NUMBERS else POINTERS.get(name, "*bf16")
        signature[name] = types.get(name, default)
        if signature[name] == "i32" or signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    made = to_machine_code(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = made.asm["ptx"]
    report = {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared": made.metadata.shared,
        "matrix_unit": "wgmma" if "wgmma" in code else "mma" if "mma.sync" in code else "",
        "tma": "cp.async.bulk.tensor" in code,
        "pipelined": "cp.async" in code,
        "spills": "st.local" in code,
    }
    print(json.dumps(report), flush=True)


def passes(capability: int) -> None:
    """The kernels of one pass."""
    fp8 = capability >= HOPPER
    wide = {} if fp8 else {"out8": "*bf16"}
    forms = {"KEEP": True, "QUANTIZE": fp8}
    build(
        fused._norm_kernel,
        {**forms, "HAS_RESIDUAL": True, "HAS_BETA": True, "BLOCK": 1024},
        capability,
        wide,
        num_warps=4,
    )
    for kind in sorted(fused.FUSED_ACTIVATIONS):
        constants = {**forms, "KIND": kind, "HAS_BIAS": True, "BLOCK": 1024}
        build(fused._activate_kernel, constants, capability, wide, num_warps=4)
    build(fused._mean_kernel, {"HAS_WEIGHTS": True, "BLOCK": 256}, capability, {}, num_warps=4)


def attentions(capability: int) -> None:
    """Attention: plain, and with all that can be added to the scores."""
    fp8 = capability >= HOPPER
    for size, biased in ((64, False), (32, False), (64, True)):
        constants = {
            "HAS_KEY_BIAS": biased, "HAS_BIAS": biased, "KEEP": not fp8 or biased, "QUANTIZE": fp8, "QUERIES": TILE,
            "KEYS": 64, "SIZE": size, "V_SIZE": size, "BLOCK": size, "V_BLOCK": size,
        }  # fmt: skip
        types = {"bias": "*fp32"} | ({} if fp8 else {"out8": "*bf16"})
        build(attention._attention_kernel, constants, capability, types, num_warps=4, num_stages=3)


def gemms() -> None:
    """The persistent product, in every tiling, with e4m3 or bf16 results."""
    for element, tilings in (("fp8e4nv", gemm.FP8_TILINGS), ("bf16", gemm.HALF_TILINGS)):
        for tiling in tilings:
            for quantize in (True, False):
                block = f"[{tiling.rows},{tiling.columns}]"
                types = {
                    "x": f"tensordesc<{element}[{tiling.rows},{tiling.depth}]>",
                    "weight": f"tensordesc<{element}[{tiling.columns},{tiling.depth}]>",
                    "out": "*bf16" if quantize else f"tensordesc<bf16{block}>",
                    "out8": f"tensordesc<fp8e4nv{block}>" if quantize else "*bf16",
                }
                constants = {
                    "KIND": "gelu" if quantize else "", "HAS_BIAS": True, "KEEP": not quantize, "QUANTIZE": quantize,
                    "ROWS": tiling.rows, "COLUMNS": tiling.columns, "DEPTH": tiling.depth, "PROGRAMS": 132,
                }  # fmt: skip
                build(gemm._gemm_kernel, constants, HOPPER, types, num_warps=tiling.warps, num_stages=tiling.stages)


if __name__ == "__main__":
    for target in (AMPERE, HOPPER):
        passes(target)
        attentions(target)
    gemms()
