"""Attention over packed sequences of different lengths, as one Triton kernel.

A program takes one tile of queries of one sequence and one head, and walks over that sequence's keys with an online
softmax. Which tiles there are is worked out on the host (:func:`espalier.gpu.batches.tiles_of`), so the grid does not
depend on the longest sequence and idle programs are few.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from espalier.gpu.batches import TILE
from espalier.gpu.form import Form, Result, empty_result
from espalier.gpu.kernels.fused import to_e4m3

_KEYS = 64
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_kernel(
    q, k, v, out, out8, bounds, tiles, key_bias, bias, starts,
    q_stride, k_stride, v_stride, out_stride,
    bias_batch, bias_head, bias_query, bias_key,
    scale, inverse_scale, tokens,
    HAS_KEY_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, V_SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    head = tl.program_id(1)
    if sequence < 0:  # rows behind the last sequence
        row = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, QUERIES)
        column = tl.arange(0, V_BLOCK)
        empty = (row < tokens)[:, None] & (column < V_SIZE)[None, :]
        spot = row.to(tl.int64)[:, None] * out_stride + head * V_SIZE + column[None, :]
        nothing = tl.zeros([QUERIES, V_BLOCK], tl.float32)
        if KEEP:
            tl.store(out + spot, nothing.to(out.dtype.element_ty), empty)
        if QUANTIZE:
            tl.store(out8 + spot, nothing.to(tl.float8e4nv), empty)
        return
    first, last = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    length = last - first
    query = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, QUERIES)
    dim, v_dim = tl.arange(0, BLOCK), tl.arange(0, V_BLOCK)
    rows = (first + query).to(tl.int64)[:, None]
    real = (query < length)[:, None]
    queries = tl.load(q + rows * q_stride + head * SIZE + dim[None, :], real & (dim < SIZE)[None, :], 0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, V_BLOCK], tl.float32)
    if HAS_BIAS:
        start = tl.load(starts + sequence)
        bias_rows = bias + sequence.to(tl.int64) * bias_batch + head * bias_head + (start + query[:, None]) * bias_query
    for at in range(0, length, KEYS):
        key = at + tl.arange(0, KEYS)
        present = key < length
        key_rows = (first + key).to(tl.int64)
        keys = tl.load(
            k + key_rows[None, :] * k_stride + head * SIZE + dim[:, None], present[None, :] & (dim < SIZE)[:, None], 0.0
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        if HAS_BIAS:
            scores += tl.load(bias_rows + (start + key[None, :]) * bias_key, real & present[None, :], 0.0)
        if HAS_KEY_BIAS:
            # Added in natural units: a mask of float32's lowest number would overflow if scaled for exp2 first.
            scores += tl.load(key_bias + key_rows, present, 0.0)[None, :]
        scores = tl.where(present[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # Rows that have met only -inf so far keep zeros; their sum of 0 becomes NaN at the end, as it should.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        powers = tl.exp2((scores - level[:, None]) * _LOG2E)
        rescale = tl.exp2((top - level) * _LOG2E)
        total = total * rescale + tl.sum(powers, 1)
        values = tl.load(
            v + key_rows[:, None] * v_stride + head * V_SIZE + v_dim[None, :],
            present[:, None] & (v_dim < V_SIZE)[None, :],
            0.0,
        )
        mixed = mixed * rescale[:, None] + tl.dot(powers.to(values.dtype), values, input_precision="ieee")
        top = higher
    mixed = mixed / total[:, None]
    place = rows * out_stride + head * V_SIZE + v_dim[None, :]
    wanted = real & (v_dim < V_SIZE)[None, :]
    if KEEP:
        tl.store(out + place, mixed.to(out.dtype.element_ty), wanted)
    if QUANTIZE:
        tl.store(out8 + place, to_e4m3(mixed, inverse_scale), wanted)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    batch: Any,
    bias: torch.Tensor | None,
    form: Form,
) -> Result:
    """``softmax(scale q k^T + biases) v`` within each sequence. ``q``, ``k`` ``[T, H*D]``, ``v`` ``[T, H*Dv]``.

    ``batch`` (:class:`espalier.gpu.batches.DeviceBatch`) says where sequences begin and has the bias per key; ``bias``
    float32 ``[B or 1, H or 1, S or 1, S or 1]`` is in the columns of the padded batch. Rows of no sequence become zero.
    """
    size, v_size = q.shape[1] // heads, v.shape[1] // heads
    kept, quantized = empty_result((v.shape[0], v.shape[1]), v.device, form)
    # An extent of one is broadcast by a stride of zero.
    strides = [0] * 4 if bias is None else [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
    _attention_kernel[(len(batch.tiles), heads)](
        q, k, v, v if kept is None else kept, v if quantized is None else quantized,
        batch.bounds, batch.tiles, v if batch.key_bias is None else batch.key_bias, v if bias is None else bias,
        batch.starts, q.stride(0), k.stride(0), v.stride(0), v.shape[1], *strides, scale, form.inverse_scale, len(v),
        HAS_KEY_BIAS=batch.key_bias is not None, HAS_BIAS=bias is not None,
        KEEP=kept is not None, QUANTIZE=quantized is not None,
        QUERIES=TILE, KEYS=_KEYS, SIZE=size, V_SIZE=v_size,
        # A matrix unit takes at least 16 by 16.
        BLOCK=triton.next_power_of_2(max(16, size)), V_BLOCK=triton.next_power_of_2(max(16, v_size)),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return kept, quantized
