"""Attention over packed sequences by PyTorch's own kernels, without biases or masks: two more ways, to choose among."""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch

from espalier.gpu.batches import DeviceBatch


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, batch: DeviceBatch
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` within each sequence; all ``[T, H*D]``. Rows of no sequence attend to each other."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = len(q)
    # The number of sequences that end at or before a token: the same for all tokens of one sequence.
    sequence = torch.searchsorted(
        batch.bounds[1:].contiguous(), torch.arange(tokens, device=q.device, dtype=torch.int32), right=True
    )

    def same_sequence(
        _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return sequence[query] == sequence[key]

    mask = create_block_mask(same_sequence, None, None, tokens, tokens, device=str(q.device))
    run = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mixed: torch.Tensor = run(q, k, v, block_mask=mask, scale=scale)
    return mixed.squeeze(0).transpose(0, 1).flatten(1)


@lru_cache(maxsize=1)
def has_varlen() -> bool:
    """Whether this PyTorch has varlen attention that takes a scale (2.11 and later)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "scale" in inspect.signature(varlen_attn).parameters


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, batch: DeviceBatch
) -> torch.Tensor:
    """FlashAttention over sequences of different lengths. Arguments as of :func:`flex`."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    longest = batch.shape.longest
    mixed = varlen_attn(q, k, v, batch.bounds, batch.bounds, longest, longest, scale=scale)
    # A result of several forms would be a tuple; this asks for one.
    flat: torch.Tensor = mixed.flatten(1)  # type: ignore[union-attr]
    return flat
