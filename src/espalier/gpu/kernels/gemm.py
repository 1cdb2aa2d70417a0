"""A persistent matrix product for Hopper in Triton, with everything that follows it in its epilogue.

One program per multiprocessor walks over tiles of the result; operands come through tensor descriptors (TMA). The
epilogue scales, adds the bias, activates and quantises, so that what a library would write and a second kernel read
again never leaves the chip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from espalier.gpu.form import Form, Result, empty_result
from espalier.gpu.kernels.fused import activate, to_e4m3


@dataclass(frozen=True)
class Tiling:
    """The shape of a tile of the result and of a step along K, and how many steps are in flight."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


FP8_TILINGS = (Tiling(128, 256, 128, 3, 8), Tiling(128, 128, 128, 4, 8), Tiling(64, 128, 128, 4, 4))
HALF_TILINGS = (Tiling(128, 256, 64, 3, 8), Tiling(128, 128, 64, 4, 8), Tiling(64, 128, 64, 4, 4))
"""What the tuner tries, large tiles first: those suit large batches."""


@triton.jit
def _gemm_kernel(
    x, weight, bias, out, out8, tokens, features, depth, scale, inverse_scale,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(tokens, ROWS), tl.cdiv(features, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        # Neighbouring programs share a column tile of the weight and differ in rows: both fit the L2 cache.
        row, column = (tile % row_tiles) * ROWS, (tile // row_tiles) * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, depth, DEPTH):
            total = tl.dot(x.load([row, at]), weight.load([column, at]).T, total, input_precision="ieee")
        features_here = column + tl.arange(0, COLUMNS)
        y = total * scale
        if HAS_BIAS:
            y += tl.load(bias + features_here, features_here < features, 0.0).to(tl.float32)[None, :]
        y = activate(y, KIND)
        if KEEP:
            out.store([row, column], y.to(out.dtype))
        if QUANTIZE:
            out8.store([row, column], to_e4m3(y, inverse_scale))


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    kind: str,
    form: Form,
    *,
    tiling: Tiling,
    programs: int,
) -> Result:
    """``activation(scale * x @ weight.T + bias)``. ``x`` ``[T, K]``, ``weight`` ``[M, K]``, both e4m3 or both half.

    Rows must be whole multiples of 16 bytes, as TMA asks. ``programs`` is the number of multiprocessors. ``T >= 1``.
    """
    (tokens, depth), features = x.shape, weight.shape[0]
    kept, quantized = empty_result((tokens, features), x.device, form)
    operands = [
        TensorDescriptor.from_tensor(x, [tiling.rows, tiling.depth]),
        TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth]),
    ]
    results = [
        x if result is None else TensorDescriptor.from_tensor(result, [tiling.rows, tiling.columns])
        for result in (kept, quantized)
    ]
    _gemm_kernel[(programs,)](
        *operands, x if bias is None else bias, *results, tokens, features, depth, scale, form.inverse_scale,
        KIND=kind, HAS_BIAS=bias is not None, KEEP=kept is not None, QUANTIZE=quantized is not None,
        ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, PROGRAMS=programs,
        num_stages=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
    return kept, quantized


def fits(weight: torch.Tensor) -> bool:
    """Whether the kernel takes this weight: TMA wants rows of whole 16 bytes, on both sides of the product."""
    rows, depth = weight.shape
    return depth * weight.element_size() % 16 == 0 and rows % 16 == 0 and weight.is_contiguous()
