"""Compiled segments and plans against the NumPy bodies of the native ops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoder import LOWEST, VOCABULARY, Tiny, encoder, feeds

from espalier import compiler
from espalier.compiler.formats import Tuner, float_candidates
from espalier.compiler.matrices import SparseConstant, SparseIntegers
from espalier.errors import ModelFormatError
from espalier.ir import Graph, TensorType, reference
from espalier.ir.quantization import dequantize
from espalier.ir.stored import ScaledTable
from espalier.passes.partition import NativeSegment, Program


def compare(
    graph: Graph, found: dict[str, np.ndarray], given_: dict[str, np.ndarray], *, padding: bool = False
) -> None:
    for name, want in reference.run(graph, given_).items():
        got = found[name]
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        if want.shape[:2] == given_["mask"].shape and not padding:
            got, want = got[given_["mask"] == 1], want[given_["mask"] == 1]
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 9),
    seq=st.integers(1, 70),
    mask=st.sampled_from(["full", "right", "left", "holes"]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    pattern=st.sampled_from([1, 4]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_any_shape_sparsity_and_mask(
    batch: int, seq: int, mask: str, sparsity: float, pattern: int, threads: int, seed: int
) -> None:
    graph = encoder(sparsity=sparsity, pattern=pattern)
    given_ = feeds(batch, seq, mask, seed)
    compare(graph, compiler.build(graph, threads=threads, tune=False).run(given_), given_)


@pytest.mark.parametrize("mask", ["full", "right", "left", "holes"])
def test_exact_padding_computes_what_masks_hide(mask: str) -> None:
    graph = encoder()
    given_ = feeds(4, 21, mask)
    program = compiler.build(graph, threads=2, tune=False, exact_padding=True)
    compare(graph, program.run(given_), given_, padding=True)


@pytest.mark.parametrize("mask_value", [-5.0, -10000.0, -1e9, LOWEST])
@pytest.mark.parametrize("bias", [False, True])
def test_mask_values_and_biases(mask_value: float, bias: bool) -> None:
    graph = encoder(mask_value=mask_value, bias=bias)
    program = compiler.build(graph, threads=2, tune=False)
    for mask in ("right", "left", "holes"):
        given_ = feeds(3, 19, mask)
        compare(graph, program.run(given_), given_)


def test_ragged_is_the_same_as_padded() -> None:
    graph = encoder(sparsity=0.8)
    program = compiler.build(graph, threads=2, tune=False)
    given_ = feeds(6, 40, "right")
    lengths = given_["mask"].sum(axis=1)
    rows = {name: [row[:n] for row, n in zip(array, lengths, strict=True)] for name, array in given_.items()}
    padded, ragged = program.run(given_), program.run_ragged(rows)
    for name in graph.outputs[:-1]:  # the last reads the last column, which is padding in one and a token in the other
        for i, got in enumerate(ragged[name]):
            want = padded[name][i, : lengths[i]] if padded[name].shape[:2] == given_["mask"].shape else padded[name][i]
            np.testing.assert_array_equal(got, want)


def test_the_last_token_of_ragged_sequences_is_each_ones_own() -> None:
    t = Tiny()
    x = t.linear(t.node("Embedding", [t.constant(VOCABULARY, 32), "ids"], ("batch", "seq", 32)), 32, 8)
    graph = t.done(t.node("SelectToken", [x], ("batch", 8), index=-1))
    program = compiler.build(graph, threads=1, tune=False)
    rows = [np.arange(n, dtype=np.int64) + n for n in (3, 17, 1)]
    masks = [np.ones_like(row) for row in rows]
    (together,) = program.run_ragged({"ids": rows, "mask": masks}).values()
    for row, mask, got in zip(rows, masks, together, strict=True):
        (alone,) = program.run({"ids": row[None], "mask": mask[None]}).values()
        np.testing.assert_array_equal(got, alone[0])


def test_many_callers_get_the_sequential_answers() -> None:
    graph = encoder(sparsity=0.9)
    program = compiler.build(graph, threads=2, tune=False)
    inputs = [feeds(1 + i % 4, 5 + 3 * i, "right", i) for i in range(8)]
    want = [program.run(given_) for given_ in inputs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(program.run, inputs * 10))
    for i, found in enumerate(got):
        for name, array in found.items():
            np.testing.assert_array_equal(array, want[i % 8][name])


def test_empty_batch() -> None:
    graph = encoder()
    found = compiler.build(graph, threads=1, tune=False).run(feeds(0, 7, "full"))
    assert [array.shape for array in found.values()] == [(0, 7, 32), (0, 32), (0, 32), (0, 7), (0, 32)]


def plan_of(graph: Graph, path: Path, *, exact: bool = True) -> Path:
    return compiler.save_plan(Program.of(graph, [NativeSegment(graph)]), path, exact=exact)


def test_an_exact_plan_gives_the_same_bits(tmp_path: Path) -> None:
    graph = encoder(sparsity=0.9)
    path = plan_of(graph, tmp_path / "tiny.espalier")
    step = compiler.read_plan(path).steps[0]
    assert isinstance(step, NativeSegment)
    given_ = feeds(3, 17, "right")
    want = compiler.build(graph, threads=1, tune=False).run(given_)
    got = compiler.build(step.graph, threads=1, tune=False).run(given_)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    sizes = [plan_of(encoder(sparsity=s), tmp_path / "size.espalier").stat().st_size for s in (0.0, 0.9)]
    assert sizes[1] < sizes[0]


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_plan_is_refused(tmp_path_factory: pytest.TempPathFactory, at: float, bit: int, cut: bool) -> None:
    folder = tmp_path_factory.mktemp("plan")
    path = plan_of(encoder(sparsity=0.9), folder / "tiny.espalier")
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    path.write_bytes(data)
    try:
        compiler.read_plan(path)
    except ModelFormatError:
        return
    # Only the padding after the header's JSON carries nothing.
    header = 8 + int.from_bytes(data[:8], "little")
    assert header - 64 <= place < header


def test_matrices_survive_storage_bit_for_bit() -> None:
    from espalier import _native

    dense = np.zeros((5, 1200), np.float32)
    dense[0, [0, 255, 256, 1199]] = [1.5, np.nan, np.inf, -1e-42]
    dense[2, 1199] = 3
    dense[4] = np.arange(1, 1201)
    stored = SparseConstant.of(_native.compress(dense))
    np.testing.assert_array_equal(np.asarray(stored).view(np.uint32), dense.view(np.uint32))


def test_integers_survive_storage_bit_for_bit() -> None:
    random = np.random.default_rng(0)
    zero = random.integers(0, 256, 6).astype(np.uint8)
    for width in (1, 4):
        q = random.integers(0, 256, (6, 1200)).astype(np.uint8)
        kept = random.random((6, 1200 // width)).repeat(width, 1) < 0.1
        kept[2], kept[3, :1100] = False, False  # an empty row, and a gap of more than one byte
        q = np.where(kept, q, zero[:, None])
        stored = SparseIntegers.of(q, zero)
        assert stored is not None
        assert stored.values.shape[1] == width
        np.testing.assert_array_equal(np.asarray(stored), q)
        assert np.asarray(stored).dtype == q.dtype
    assert SparseIntegers.of(np.ones((6, 8), np.int8), None) is None


def test_a_sparse_weight_of_integers_takes_a_twentieth_of_its_floats(tmp_path: Path) -> None:
    """90 % of zeros in 1x4 blocks."""
    random = np.random.default_rng(0)
    q = random.integers(-127, 128, (768, 768)).astype(np.int8)
    q[random.random((768, 192)).repeat(4, 1) < 0.9] = 0
    stored = SparseIntegers.of(q, None)
    assert stored is not None
    assert stored.stored_bytes <= 0.05 * q.size * 4


def test_tables_survive_storage() -> None:
    table = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    table[3] = 0
    error = np.abs(np.asarray(ScaledTable.of(table)) - table)
    assert (error <= np.abs(table).max(axis=1, keepdims=True) / 65534 * 1.01).all()
    for zero, dtype in ((np.uint8(128), np.int8), (np.uint8(3), np.int16)):
        q = np.arange(256, dtype=np.uint8).reshape(8, 32)
        scale = np.float32(0.037)
        kept = ScaledTable.dequantized(q, scale, zero)
        assert kept.integers.dtype == dtype
        np.testing.assert_array_equal(np.asarray(kept), dequantize(q, scale, zero))


def test_the_tuner_remembers_and_survives_a_broken_cache(tmp_path: Path) -> None:
    from espalier import _native

    cache = tmp_path / "tuning.json"
    cache.write_text("{not json")
    matrix = _native.compress(np.eye(64, dtype=np.float32))
    tuner = Tuner(_native.current_isa(), tune=True, cache=cache)
    ranked = float_candidates(matrix, tuner.isa)
    chosen = tuner.choose("a weight", ranked)
    tuner.save()
    again = Tuner(tuner.isa, tune=True, cache=cache)
    assert again.choose("a weight", ranked) == chosen
    assert chosen.measured
    assert not Tuner(tuner.isa, tune=False, cache=cache).choose("a weight", ranked).measured


def test_float_tokens_in_a_batch_of_one() -> None:
    """A fixed batch of 1 must not be taken for something to broadcast."""
    t = Tiny()
    t.graph.inputs, t.graph.types = ["x"], {"x": TensorType("float32", (1, "seq", 8))}
    graph = t.done(t.linear("x", 8, 4))
    x = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
    program = compiler.NativeProgram(graph, threads=1, tune=False)
    want = reference.run(graph, {"x": x})
    (name,) = graph.outputs
    np.testing.assert_allclose(program.run({"x": x})[name], want[name], rtol=1e-5, atol=1e-6)
