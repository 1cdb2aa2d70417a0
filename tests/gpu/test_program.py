"""The executor in PyTorch on the CPU against the reference of the dialect, the engine, and ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'espalier[gpu]'")

from tiny_encoder import LOWEST, VOCABULARY, Feeds, Tiny, encoder, feeds

from espalier import gpu
from espalier.compiler.packed import Accelerator
from espalier.errors import EngineError, InputError, ModelFormatError, UnsupportedModelError
from espalier.gpu.program import GpuProgram, Limits
from espalier.gpu.scales import Calibration, LayerScale, fingerprint
from espalier.ir import Graph, TensorType, reference


def program_of(graph: Graph, **options: Any) -> GpuProgram:
    return gpu.build(graph, device="torch-cpu", **{"precision": "fp32", **options})


def largest_error(got: Feeds, want: Feeds, mask: np.ndarray, *, padding: bool = False) -> float:
    """Over all outputs, relative to each one's largest value (at least 1); the types and shapes must be equal."""
    worst = 0.0
    for name, expected in want.items():
        found = got[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if expected.shape[:2] == mask.shape and not padding:
            found, expected = found[mask == 1], expected[mask == 1]
        assert np.isfinite(found).all()
        largest = max(1.0, float(np.abs(expected).max(initial=0)))
        worst = max(worst, float(np.abs(found - expected).max(initial=0)) / largest)
    return worst


def check(graph: Graph, program: GpuProgram, given_: Feeds, *, error: float = 2e-5, padding: bool = False) -> None:
    assert largest_error(program.run(given_), reference.run(graph, given_), given_["mask"], padding=padding) < error


ENCODER = encoder()
ENCODER_PROGRAM = program_of(ENCODER)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 9),
    seq=st.integers(1, 70),
    mask=st.sampled_from(["full", "right", "left", "holes"]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mask(batch: int, seq: int, mask: str, seed: int) -> None:
    check(ENCODER, ENCODER_PROGRAM, feeds(batch, seq, mask, seed))


@pytest.mark.parametrize("mask_value", [-5.0, -10000.0, -1e9, LOWEST])
@pytest.mark.parametrize("bias", [False, True])
def test_mask_values_and_biases(mask_value: float, bias: bool) -> None:
    graph = encoder(mask_value=mask_value, bias=bias, merged=bias)
    program = program_of(graph)
    for mask in ("right", "left", "holes"):
        check(graph, program, feeds(3, 19, mask))


def test_exact_padding_computes_what_masks_hide() -> None:
    program = program_of(ENCODER, exact_padding=True)
    for mask in ("right", "left", "holes"):
        check(ENCODER, program, feeds(4, 21, mask), padding=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str) -> None:
    check(ENCODER, program_of(ENCODER, precision=precision), feeds(5, 33, "right"), error=0.05)


def test_launches_of_a_few_tokens_give_what_one_gives() -> None:
    small = GpuProgram(ENCODER, device="torch-cpu", precision="fp32", limits=Limits(tokens=40, sequences=3, lanes=3))
    given_ = feeds(13, 30, "right")
    check(ENCODER, small, given_)
    masked = feeds(13, 30, "holes")
    check(ENCODER, small, masked)
    # In float32 on a CPU a sequence's result depends on its bucket by rounding at most.
    got, want = small.run(given_), ENCODER_PROGRAM.run(given_)
    assert largest_error(got, want, given_["mask"]) < 1e-5


def test_the_same_batch_gives_the_same_bits() -> None:
    given_ = feeds(6, 40, "right")
    first, second = ENCODER_PROGRAM.run(given_), ENCODER_PROGRAM.run(given_)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_ragged_sequences_get_what_each_gets_alone() -> None:
    given_ = feeds(6, 40, "right")
    lengths = given_["mask"].sum(axis=1)
    rows = {name: [row[:n] for row, n in zip(array, lengths, strict=True)] for name, array in given_.items()}
    ragged = ENCODER_PROGRAM.run_ragged(rows)
    for i in range(6):
        alone = ENCODER_PROGRAM.run({name: sequences[i][None] for name, sequences in rows.items()})
        for name, (want,) in alone.items():
            np.testing.assert_allclose(ragged[name][i], want, rtol=1e-5, atol=1e-5)


def test_many_callers_get_the_sequential_answers() -> None:
    inputs = [feeds(1 + i % 4, 5 + 3 * i, "right", i) for i in range(8)]
    want = [ENCODER_PROGRAM.run(given_) for given_ in inputs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(ENCODER_PROGRAM.run, inputs * 4))
    for i, found in enumerate(got):
        for name, array in found.items():
            np.testing.assert_array_equal(array, want[i % 8][name])


def test_empty_batch() -> None:
    found = ENCODER_PROGRAM.run(feeds(0, 7, "full"))
    assert [array.shape for array in found.values()] == [(0, 7, 32), (0, 32), (0, 32), (0, 7), (0, 32)]


def test_warming_up_leaves_a_graph_for_every_size() -> None:
    program = GpuProgram(ENCODER, device="torch-cpu", precision="fp32", limits=Limits(tokens=256, lanes=2))
    made: list[object] = []
    capture = program.runtime.capture

    def count(work: Callable[[], None], stream: object, pool: object) -> Callable[[], None]:
        made.append(work)
        return capture(work, stream, pool)

    program.runtime.capture = count  # type: ignore[method-assign]
    assert program.warm_up([20, 60, 30]) == 0.0  # PyTorch on the CPU gains nothing by it
    program.runtime.captures = True
    assert program.warm_up([20, 60, 30]) > 0.0
    captured = len(made)
    assert captured >= 2 * 4
    check(ENCODER, program, feeds(1, 30, "full"))
    check(ENCODER, program, feeds(6, 40, "full"))
    assert len(made) == captured


@pytest.mark.parametrize("column", [0, 3, -2])
def test_warming_up_with_biases_and_columns(column: int) -> None:
    t = Tiny()
    inputs = [*[t.embedded()] * 3, "mask", "bias"]
    x = t.node("Attention", inputs, ("batch", "seq", 32), heads=4, scale=0.35, mask_value=LOWEST)
    t.graph.inputs.append("bias")
    t.graph.types["bias"] = TensorType("float32", ("batch", 1, "seq", "seq"))
    graph = t.done(t.node("SelectToken", [x], ("batch", 32), index=column))
    program = GpuProgram(graph, device="torch-cpu", precision="fp32", limits=Limits(tokens=128))
    program.runtime.captures = True
    assert program.warm_up([1, 5, 20], tokens=64) > 0.0


def test_a_session_names_its_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import espalier

    session = espalier.load(folder, device="torch-cpu")
    assert session.accelerator is None
    found = Accelerator("Made-up H100", 80 << 30)
    monkeypatch.setattr(session._steps[0].program, "accelerator", found)
    assert session.accelerator == found
    assert espalier.load(folder, threads=1, tune=False).accelerator is None


def test_a_session_warms_up_its_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import espalier

    seen: list[Any] = []
    monkeypatch.setattr(GpuProgram, "warm_up", lambda _, lengths, *, tokens: seen.append((lengths, tokens)) or 2.0)
    assert espalier.load(folder, device="torch-cpu").warm_up([3, 9], tokens=64) == 2.0
    assert seen == [([3, 9], 64)]
    session = espalier.load(folder, threads=1, tune=False)
    assert session.warm_up() == 0.0
    for lengths, tokens in (([], None), ([3, 0], None), ([3], 0)):
        with pytest.raises(InputError, match="at least one token"):
            session.warm_up(lengths, tokens=tokens)


def test_an_id_outside_its_table_never_reaches_the_device() -> None:
    given_ = feeds(2, 5, "full")
    for wrong in (-1, VOCABULARY):
        given_["ids"][1, 2] = wrong
        with pytest.raises(EngineError, match=f"index {wrong} is outside a table of {VOCABULARY} rows"):
            ENCODER_PROGRAM.run(given_)


def test_float_tokens_and_whole_sequences() -> None:
    t = Tiny()
    tokens, vector = TensorType("float32", ("batch", "seq", 8)), TensorType("float32", ("batch", 8))
    t.graph.inputs += ["x", "y"]
    t.graph.types |= {"x": tokens, "y": vector}
    h = t.node("Softmax", [t.linear("x", 8, 4)], ("batch", "seq", 4))
    mean = t.node("MaskedMean", [h, "mask"], ("batch", 4), epsilon=1e-9)
    both = t.node("Sub", [t.linear("y", 8, 4), mean], ("batch", 4))
    scaled = t.node("Div", [t.graph.add_constant("two", np.float32(2)), both], ("batch", 4))
    graph = t.done(h, scaled)
    random = np.random.default_rng(0)
    given_ = feeds(5, 9, "right")
    given_ |= {
        name: random.standard_normal((5, 9, 8)[: 3 if name == "x" else 1] + ((8,) if name == "y" else ())).astype(
            np.float32
        )
        for name in "xy"
    }
    check(graph, program_of(graph), given_)
    got, want = (
        GpuProgram(graph, device="torch-cpu", precision="fp32", limits=Limits(tokens=12)).run(given_),
        program_of(graph).run(given_),
    )
    assert largest_error(got, want, given_["mask"]) < 1e-5


@pytest.mark.parametrize("weight", [np.int8, np.uint8])
@pytest.mark.parametrize("activations", ["static", "token"])
@pytest.mark.parametrize("x_type", [np.int8, np.uint8])
@pytest.mark.parametrize("zeros", [False, True])
def test_8_bit_layers(weight: Any, activations: str, x_type: Any, zeros: bool) -> None:
    t = Tiny()
    x = t.embedded()
    scale, zero = t.graph.add_constant("s", np.float32(0.02)), t.graph.add_constant("z", x_type(7))
    x = t.node("FakeQuantize", [x, scale, zero], ("batch", "seq", 32))
    rows = 24
    row_scales = t.graph.add_constant("scales", np.random.default_rng(1).uniform(0.001, 0.01, rows).astype(np.float32))
    inputs = [
        x,
        t.integers(rows, 32, dtype=weight),
        row_scales,
        t.integers(rows, dtype=weight) if zeros else "",
        t.constant(rows),
    ]
    if activations == "static":
        inputs += [scale, zero]
    y = t.node("QLinear", inputs, ("batch", "seq", rows), activations=activations)
    y = t.node("Activation", [y], ("batch", "seq", rows), kind="relu")
    graph = t.done(y)
    check(graph, program_of(graph), feeds(3, 11, "right"))
    (layer,) = (layer for layer in program_of(graph).layers() if layer.op == "QLinear")
    assert layer.type == ("int8" if activations == "static" else "int8 per token")


def test_nothing_is_copied_to_the_device_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    t = Tiny()
    scale, zero = t.graph.add_constant("s", np.float32(0.02)), t.graph.add_constant("z", np.int8(7))
    x = t.node("FakeQuantize", [t.embedded(), scale, zero], ("batch", "seq", 32))
    inputs = [x, t.integers(24, 32), t.graph.add_constant("w", np.float32(0.01)), "", t.constant(24), scale, zero]
    graph = t.done(t.node("QLinear", inputs, ("batch", "seq", 24), activations="static"))
    program = program_of(graph)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a CUDA graph cannot hold a copy from memory of the host that is not pinned")

    def capture(work: Callable[[], None], *_: Any) -> Callable[[], None]:
        def captured() -> None:
            with monkeypatch.context() as patch:
                for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
                    patch.setattr(owner, name, refuse)
                work()

        return captured

    monkeypatch.setattr(program.runtime, "capture", capture)
    check(graph, program, feeds(3, 11, "right"))


def calibrated(graph: Graph, **precisions: str) -> Calibration:
    """Generous scales for every layer that takes FP8."""
    layers = {
        node.name: LayerScale(0.02, 0.03, precisions.get(node.name, "fp8"))
        for node in graph.nodes
        if node.op == "Linear" and len(graph.types[node.inputs[0]].shape or ()) == 3 and node.name != "linear_7"
    }
    return Calibration(fingerprint(graph), layers, 1)


def test_fp8_where_the_calibration_says_so() -> None:
    program = program_of(ENCODER, precision=None, calibration=calibrated(ENCODER, linear_3="bf16"))
    types = {layer.name: layer.type for layer in program.layers() if layer.op == "Linear"}
    assert types == {
        "linear + linear_1 + linear_2": "fp8",
        "linear_3": "bfloat16",
        "linear_4": "fp8",
        "linear_5": "fp8",
        "linear_6": "bfloat16",
        "linear_7": "bfloat16",
    }
    # What only FP8 layers read exists as e4m3 alone; the residual stream stays wide.
    forms = {i.out: (i.form.scale is not None, i.form.keep) for i in program.instructions}
    assert forms["activation"] == (True, False)
    assert forms["layernorm"] == forms["layernorm_1"] == (True, True)
    assert forms["attention"] == (False, True)
    check(ENCODER, program, feeds(5, 33, "right"), error=0.3)
    assert (
        largest_error(
            program.run(feeds(5, 33, "right")),
            program_of(ENCODER, precision="bf16").run(feeds(5, 33, "right")),
            feeds(5, 33, "right")["mask"],
        )
        > 0
    )


def test_layers_of_one_attention_that_differ_in_precision_stay_apart() -> None:
    program = program_of(ENCODER, precision=None, calibration=calibrated(ENCODER, linear_1="bf16"))
    names = [layer.name for layer in program.layers() if layer.op == "Linear"]
    assert names[:2] == ["linear + linear_2", "linear_1"]
    check(ENCODER, program, feeds(5, 33, "right"), error=0.3)


def test_fp8_is_refused_where_it_cannot_be() -> None:
    scales = Calibration(fingerprint(ENCODER), {"linear_7": LayerScale(1.0, 0.0, "fp8")}, 1)
    with pytest.raises(UnsupportedModelError, match=r"'linear_7' cannot run in FP8.*Linear of \[2, 32\]"):
        program_of(ENCODER, precision=None, calibration=scales)


def test_reports_say_which_zeros_are_multiplied() -> None:
    graph = encoder()
    for node in graph.nodes:
        if node.name == "linear_4":
            graph.constants[node.inputs[1]] = graph.constants[node.inputs[1]] * (np.arange(32) % 4 < 2)
        if node.name == "linear_5":
            graph.constants[node.inputs[1]] = graph.constants[node.inputs[1]] * (np.arange(48) % 8 < 3)
    layers = {layer.name: layer for layer in program_of(graph).layers()}
    assert layers["linear_4"].why == "its 2:4 zeros are multiplied too: the device is a CPU"
    assert layers["linear_4"].sparsity == pytest.approx(0.5)
    assert layers["linear_5"].why == "its zeros are multiplied too: a GPU skips only 2:4"
    assert layers["linear_3"].why == ""


def test_operations_can_be_timed_one_by_one() -> None:
    from espalier.compiler.packed import PackedBatch

    program = program_of(ENCODER)
    assert program.profile() == []
    lengths = np.array([5, 9], np.int32)
    index = np.arange(14, dtype=np.int32)
    rows = program.measure(PackedBatch(lengths, np.zeros(2, np.int32), lengths, 9, [index, index], [], [], None, None))
    assert {row.name for row in rows} >= {"linear_3", "attention", "layernorm_1"}
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert program.profile() == rows


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT for questions, as a Hugging Face folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bert")
    model = transformers.BertForQuestionAnswering(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


def model_feeds(batch: int = 4, seq: int = 21) -> Feeds:
    made = feeds(batch, seq, "right")
    return {"input_ids": made["ids"], "attention_mask": made["mask"], "token_type_ids": np.zeros_like(made["ids"])}


@pytest.mark.parametrize("kind", ["hf", "onnx", "plan"])
def test_sessions_agree_with_onnxruntime(folder: Path, tmp_path: Path, kind: str) -> None:
    import espalier
    from espalier import hf
    from espalier.onnx.writer import write
    from espalier.ort import OrtProgram

    onnx_file = write(hf.read(folder), tmp_path / "model.onnx")
    model = {"hf": folder, "onnx": onnx_file}.get(kind) or espalier.compile(
        folder, tmp_path / "model.espalier", exact=True, tune=False
    )
    session = espalier.load(model, device="torch-cpu", precision="fp32")
    assert session.device == "torch-cpu"
    assert {step.where for step in session.report().steps} == {"torch-cpu"}
    given_ = model_feeds()
    want = OrtProgram(onnx_file, threads=1).run(None, given_)
    got = session.run(None, given_)
    mask = given_["attention_mask"] == 1
    for expected, found in zip(want, got, strict=True):
        np.testing.assert_allclose(found[mask], expected[mask], rtol=2e-5, atol=2e-5)
    sequences = [row[:n].tolist() for row, n in zip(given_["input_ids"], mask.sum(axis=1), strict=True)]
    for expected, rows in zip(got, session.run_ragged(None, sequences), strict=True):
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, expected[i, : len(row)], rtol=1e-5, atol=1e-5)


def test_calibration_from_data_to_a_session(folder: Path, tmp_path: Path) -> None:
    import espalier

    out = espalier.calibrate(folder, [model_feeds(), [[3, 4, 5], [6, 7]]], tmp_path / "model.fp8.json")
    content = json.loads(out.read_text())
    assert content["tokens"] == int(model_feeds()["attention_mask"].sum()) + 5
    assert len(content["layers"]) == 12
    assert all(0 < layer["error"] < 0.06 and layer["precision"] == "fp8" for layer in content["layers"].values())
    session = espalier.load(folder, device="torch-cpu", calibration=out)
    types = [layer.type for layer in session.report().layers if layer.op == "Linear"]
    assert types == ["fp8"] * 8 + ["bfloat16"]
    exact = espalier.load(folder, threads=1, tune=False).run(None, model_feeds())
    mask = model_feeds()["attention_mask"] == 1
    for want, got in zip(exact, session.run(None, model_feeds()), strict=True):
        difference = np.abs(want - got)[mask].max() / max(1.0, np.abs(want[mask]).max())
        assert 1e-4 < difference < session.tolerance
    strict = espalier.calibrate(folder, [model_feeds()], tmp_path / "strict.json", max_error=1e-6)
    assert Calibration.load(strict).scales == {}


def test_scales_are_not_learnt_in_the_engine(folder: Path, tmp_path: Path) -> None:
    import espalier

    with pytest.raises(InputError, match="device='torch-cpu' or 'cuda'; got 'cpu'"):
        espalier.calibrate(folder, [], tmp_path / "scales.json", device="cpu")


def test_a_calibration_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    import espalier

    other = Calibration(fingerprint(ENCODER), {}, 1)
    other.save(tmp_path / "other.json")
    with pytest.raises(ModelFormatError, match="another model"):
        espalier.load(folder, device="torch-cpu", calibration=tmp_path / "other.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("layers"),
        lambda c: c["layers"]["a"].update(scale=0),
        lambda c: c["layers"]["a"].update(scale="nan"),
        lambda c: c["layers"]["a"].update(precision="fp4"),
        lambda c: c.update({"espalier.fp8": "99"}),
        lambda c: c.update(layers=[1]),
    ],
)
def test_damaged_calibrations_are_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    path = tmp_path / "scales.json"
    Calibration("abc", {"a": LayerScale(0.5, 0.01, "fp8")}, 3).save(path)
    assert Calibration.load(path).scales == {"a": 0.5}
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match=r"run `espalier calibrate` again|version"):
        Calibration.load(path)
    path.write_text("not json")
    with pytest.raises(ModelFormatError):
        Calibration.load(path)


# ---- the kernels of a GPU, under Triton's interpreter ----------------------------------------------------------------


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own, by test_interpreted.py"
)
@pytest.mark.parametrize("case", ["fp8", "bf16", "bias", "holes"])
@pytest.mark.parametrize("tune", [False, True])
def test_interpreted_program(case: str, tune: bool) -> None:
    from espalier.gpu.device import capabilities
    from espalier.gpu.kernels import gemm
    from espalier.gpu.kernels.fast import FastKernels

    graph = encoder(bias=case == "bias")
    scales = calibrated(graph) if case == "fp8" else None
    eager = program_of(graph, precision=None, calibration=scales)
    fast = program_of(graph, precision=None, calibration=scales)
    found = capabilities("made up", (9, 0), 2, 80 << 30, triton=True, semi_structured=False)
    # The later a way is measured, the faster it seems: so the persistent kernel is chosen wherever it agrees.
    clock = iter(range(10**6, 0, -1))
    kernels = FastKernels(found, lambda call: float(next(clock)), tune=tune)
    for state in ("FP8_TILINGS", "HALF_TILINGS"):
        setattr(gemm, state, (gemm.Tiling(32, 32, 32, 2, 4),))
    fast.kernels = kernels
    given_ = feeds(3, 21, "holes" if case == "holes" else "right")
    assert largest_error(fast.run(given_), eager.run(given_), given_["mask"]) < (0.2 if case == "fp8" else 0.05)
    refused = {reason for (_, name), reason in kernels.choices.refused.items() if name.startswith("persistent")}
    assert not refused
    assert not tune or "persistent 32x32" in kernels.choices.chosen.values()
