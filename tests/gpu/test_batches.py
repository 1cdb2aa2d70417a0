"""Buckets, tiles, the buffer of a batch and the splitting of many sequences: plain logic, no device."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch

from espalier.compiler.packed import PackedBatch
from espalier.gpu.batches import TILE, DeviceBatch, Layout, bucket, mixtures, shape_of, split, take, tiles_of

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def batch_of(lengths: list[int], *, masked: bool = False, weighted: bool = False, seed: int = 0) -> PackedBatch:
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    own = np.array(lengths, np.int32)
    starts = random.integers(0, 5, len(lengths)).astype(np.int32)
    return PackedBatch(
        own,
        starts,
        own + starts + 2,
        int((own + starts).max()) + 2,
        [np.arange(tokens, dtype=np.int32), random.integers(0, 9, tokens).astype(np.int32)],
        [random.random((tokens, 3)).astype(np.float32), random.random((len(lengths), 5)).astype(np.float32)],
        [],
        random.random(tokens).astype(np.float32) if masked else None,
        random.random(tokens).astype(np.float32) if weighted else None,
    )


@given(st.integers(0, 10**6), st.sampled_from([1, 16, 64]))
def test_buckets_hold_their_count_with_little_to_spare(count: int, step: int) -> None:
    size = bucket(count, step)
    assert size >= max(1, count)
    assert size % step == 0
    assert size - count <= max(step, size // 4)
    assert bucket(size, step) == size


def test_a_doubling_takes_a_few_buckets() -> None:
    assert len({bucket(count, 64) for count in range(8192, 16384)}) <= 9
    assert len({bucket(count, 64) for count in range(1, 16385)}) <= 50


@given(LENGTHS)
def test_tiles_cover_every_query_once(lengths: list[int]) -> None:
    own = np.array(lengths, np.int32)
    count = sum(lengths) // TILE + len(lengths) + 3
    tiles = tiles_of(own, count)
    assert tiles.shape == (count, 2)
    assert tiles.dtype == np.int32
    used = tiles[tiles[:, 0] >= 0]
    covered = [(s, q) for s, first in used for q in range(first, min(first + TILE, lengths[s]))]
    assert sorted(covered) == [(s, q) for s, n in enumerate(lengths) for q in range(n)]
    rest = tiles[len(used) :]
    assert (rest[:, 0] == -1).all()
    np.testing.assert_array_equal(rest[:, 1], sum(lengths) + TILE * np.arange(len(rest)))
    assert list(own[used[:, 0]]) == sorted(own[used[:, 0]], reverse=True)


@given(LENGTHS, st.booleans(), st.booleans())
def test_a_buffer_holds_the_batch_and_nothing_harmful_beyond(lengths: list[int], masked: bool, weighted: bool) -> None:
    batch = batch_of(lengths, masked=masked, weighted=weighted)
    shape = shape_of(batch)
    layout = Layout(shape, columns=[-1, 3], indices=2, floats=[("token", 3), ("sequence", 5)])
    buffer = np.full(layout.size, -77, np.int32)  # whatever an earlier batch left
    layout.fill(buffer, batch)
    found = DeviceBatch.of(layout, torch.from_numpy(buffer))
    tokens, sequences = sum(lengths), len(lengths)
    np.testing.assert_array_equal(found.bounds[: sequences + 1], np.cumsum([0, *lengths]))
    assert (found.bounds[sequences:] == tokens).all()
    for index, given_ in zip(found.indices, batch.indices, strict=True):
        np.testing.assert_array_equal(index[:tokens], given_)
        assert (index[tokens:] == 0).all()
    np.testing.assert_array_equal(found.floats[0][:tokens], batch.floats[0])
    np.testing.assert_array_equal(found.floats[1][:sequences], batch.floats[1])
    # Columns count from the row's beginning, or from its end, and a row begins in the padding.
    begins = np.cumsum([0, *lengths[:-1]])
    np.testing.assert_array_equal(found.picks[-1][:sequences], begins + batch.widths - 1 - batch.starts)
    np.testing.assert_array_equal(found.picks[3][:sequences], begins + 3 - batch.starts)
    assert (found.key_bias is None) == (not masked)
    assert (found.weights is None) == (not weighted)
    if found.key_bias is not None:
        np.testing.assert_array_equal(found.key_bias[:tokens], batch.key_bias)
    assert all(tensor.data_ptr() % 16 == buffer.ctypes.data % 16 for tensor in (found.tiles, *found.indices))


@given(LENGTHS, st.integers(1, 400), st.integers(1, 10))
def test_split_keeps_to_its_limits_and_loses_nothing(lengths: list[int], tokens: int, sequences: int) -> None:
    parts = split(lengths, tokens=tokens, sequences=sequences)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        total = sum(lengths[i] for i in part)
        assert len(part) <= sequences
        assert total <= tokens or len(part) == 1
    ordered = [lengths[i] for part in parts for i in part]
    assert ordered == sorted(ordered, reverse=True)


def test_take_follows_sequences_through_every_part() -> None:
    batch = batch_of([3, 1, 4], masked=True, weighted=True)
    batch.biases = [np.arange(3 * 4).reshape(3, 1, 2, 2), np.zeros((1, 1, 2, 2))]
    part, rows = take(batch, np.array([2, 0]), ["token", "sequence"])
    np.testing.assert_array_equal(rows, [4, 5, 6, 7, 0, 1, 2])
    np.testing.assert_array_equal(part.lengths, [4, 3])
    np.testing.assert_array_equal(part.indices[0], rows)
    np.testing.assert_array_equal(part.floats[0], batch.floats[0][rows])
    np.testing.assert_array_equal(part.floats[1], batch.floats[1][[2, 0]])
    np.testing.assert_array_equal(part.biases[0], batch.biases[0][[2, 0]])
    assert part.biases[1] is batch.biases[1]
    assert batch.key_bias is not None
    np.testing.assert_array_equal(part.key_bias, batch.key_bias[rows])


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    tokens=st.integers(1, 600),
    least=st.integers(1, 5),
)
def test_mixtures_are_of_the_lengths_and_of_all_the_tokens(lengths: list[int], tokens: int, least: int) -> None:
    found = mixtures(lengths, tokens, least=least)
    assert bool(found) == (tokens >= least and max(lengths) >= least)
    for each in found:
        assert sum(each) == tokens
        assert min(each) >= least
        assert set(each[:-1]) <= set(lengths)


def test_mixtures_have_alike_ones_and_random_ones() -> None:
    found = mixtures([8, 32, 128, 384], 256)
    assert [8] * 32 in found
    assert [256] in found
    assert any(len(set(each)) > 2 for each in found)
    assert found == mixtures([8, 32, 128, 384], 256)
