"""What `load` takes, by content, and what it says about everything else."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import espalier
from espalier import compiler
from espalier import session as module
from espalier._session.source import Source, identify
from espalier.errors import (
    EspalierError,
    GraphError,
    InputError,
    InputNameError,
    InputShapeError,
    InputTypeError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from espalier.ir import Graph
from espalier.loading import LoadSettings
from espalier.passes.partition import Program, partition

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper, parser  # noqa: E402

SMALL = """<ir_version: 8, opset_import: ["" : 17]>
small (float[N, 4] x, int64[N] i) => (float[N, 4] y) { z = Relu(x)  c = Cast<to = 1>(i)
k = Constant<value_ints = [1]>()  u = Unsqueeze(c, k)  y = Add(z, u) }"""


def small() -> Any:
    return parser.parse_model(SMALL)


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.array([[-1, 0, 1, 2]], np.float32), "i": np.array([10])}


def safetensors(metadata: dict[str, str]) -> bytes:
    header = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header


def test_path_bytes_and_proto(tmp_path: Path) -> None:
    model = small()
    path = tmp_path / "model.with.another.suffix"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.onnx").write_bytes(model.SerializeToString())
    for given_model in (
        path,
        str(path),
        model,
        model.SerializeToString(),
        bytearray(path.read_bytes()),
        tmp_path / "folder",
    ):
        (y,) = espalier.load(given_model, threads=1).run(None, feeds())
        np.testing.assert_array_equal(y, [[10, 10, 11, 12]])
    assert path.read_bytes() == model.SerializeToString()


def test_tells_kinds_apart_by_content(tmp_path: Path) -> None:
    (tmp_path / "plan.onnx").write_bytes(safetensors({"espalier": "1"}))
    assert identify(tmp_path / "plan.onnx").kind == "plan"
    (tmp_path / "model.espalier").write_bytes(small().SerializeToString())
    assert identify(tmp_path / "model.espalier").kind == "onnx"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors({}))
    assert identify(tmp_path).kind == "hf"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x00" * 100, "not an ONNX model|corrupt"),
        (b"PK\x03\x04" + b"\x00" * 100, "not an ONNX model|corrupt"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "not an ONNX model|corrupt"),
        (safetensors({}), "give the folder"),
        (struct.pack("<Q", 40) + b"{" + b"?" * 60, "header is not JSON"),
    ],
)
def test_junk_is_a_format_error(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=words):
        espalier.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        espalier.load(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError):
        espalier.load("a\0b")
    with pytest.raises(ModelFormatError, match=r"expected config\.json"):
        espalier.load(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").write_bytes(small().SerializeToString())
    with pytest.raises(ModelFormatError, match=r"a\.onnx, b\.onnx"):
        espalier.load(tmp_path)


@pytest.mark.parametrize("model", [None, 3, {}, ["model.onnx"], np.zeros(3)])
def test_not_a_model_at_all(model: Any) -> None:
    with pytest.raises(InputTypeError, match="path"):
        espalier.load(model)


def test_missing_external_data(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    ends = [value("x", TensorProto.FLOAT, ["n", 64])], [value("y", TensorProto.FLOAT, ["n", 64])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *ends, [weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (y,) = espalier.load(path, threads=1).run(None, {"x": np.ones((2, 64), np.float32)})
    assert (y == 64).all()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelNotFoundError, match=r"weights\.bin"):
        espalier.load(path)


def test_an_operator_nobody_has() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "nobody" : 1]>
    g (float[N] x) => (float[N] y) { y = nobody.Mystery(x) }"""
    with pytest.raises(UnsupportedModelError, match="Mystery"):
        espalier.load(parser.parse_model(text))


def test_compile_refuses_a_plan(tmp_path: Path) -> None:
    (tmp_path / "model.espalier").write_bytes(safetensors({"espalier": "1"}))
    with pytest.raises(ModelFormatError, match="compiled plan already"):
        espalier.compile(tmp_path / "model.espalier", tmp_path / "out.espalier")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"X": 0}, InputNameError, "did you mean 'x'|no input 'X'"),
        ({"x": np.zeros((1, 4))}, InputTypeError, r"astype\(numpy.float32\)"),
        ({"i": np.zeros(1, np.int32)}, InputTypeError, r"astype\(numpy.int64\)"),
        ({"x": np.zeros((1, 5), np.float32)}, InputShapeError, "extent 4"),
        ({"x": np.zeros(4, np.float32)}, InputShapeError, "batch axis"),
        ({"i": np.zeros(3, np.int64), "x": np.zeros((2, 4), np.float32)}, InputError, "ONNX Runtime could not run"),
    ],
)
def test_wrong_inputs_of_a_foreign_model(change: dict[str, Any], error: type[Exception], words: str) -> None:
    session = espalier.load(small(), threads=1)
    with pytest.raises(error, match=words):
        session.run(None, {**feeds(), **change})


def test_names_of_a_foreign_model() -> None:
    session = espalier.load(small(), threads=1)
    with pytest.raises(InputNameError, match="missing 'i'"):
        session.run(None, {"x": feeds()["x"]})
    with pytest.raises(InputNameError, match="no output 'why'"):
        session.run(["why"], feeds())
    with pytest.raises(InputTypeError, match="list of names"):
        session.run("y", feeds())


def test_sequences_and_strings_pass_through() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (seq(float[N]) s, int64 i) => (seq(float[N]) all, float[N] one) { all = Identity(s)  one = SequenceAt(s, i) }"""
    session = espalier.load(parser.parse_model(text), threads=1)
    given_sequence = [np.ones(2, np.float32), np.zeros(3, np.float32)]
    every, one = session.run(None, {"s": given_sequence, "i": np.array(1)})
    assert [len(array) for array in every] == [2, 3]
    assert one.shape == (3,)
    assert session.get_inputs()[0].type == "seq(tensor(float))"
    text = """<ir_version: 8, opset_import: ["" : 17]> g (string[N] x) => (string[N] y) { y = Identity(x) }"""
    session = espalier.load(parser.parse_model(text), threads=1)
    (y,) = session.run(None, {"x": np.array(["a", "b"], object)})
    assert y.tolist() == ["a", "b"]


def test_nan_is_a_value_like_any_other() -> None:
    (y,) = espalier.load(small(), threads=1).run(None, {"x": np.full((1, 4), np.nan, np.float32), "i": np.array([1])})
    assert np.isnan(y).all()


def test_a_plan_gives_the_same_answers(
    tmp_path: Path, tiny: Graph, mixed: Graph, onnx_bytes: Callable[[Graph], bytes], make_feeds: Callable[..., Any]
) -> None:
    for graph in (tiny, mixed):
        data = onnx_bytes(graph)
        plan = espalier.compile(data, tmp_path / "model.plan", threads=1, tune=False)
        before, after = espalier.load(data, threads=1, tune=False), espalier.load(plan, threads=1, tune=False)
        assert [step.where for step in after.report().steps] == [step.where for step in before.report().steps]
        assert after.get_inputs() == before.get_inputs()
        assert after.get_outputs() == before.get_outputs()
        given_feeds = make_feeds(graph.inputs, [6, 3])
        if graph is mixed:
            # Without padding, which a plan cannot tell from a token here.
            given_feeds = make_feeds(graph.inputs, [6, 6])
        for got, want in zip(after.run(None, given_feeds), before.run(None, given_feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_plan_of_a_foreign_model_stands_alone(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(small().SerializeToString())
    plan = espalier.compile(source, tmp_path / "model.espalier", threads=1)
    source.unlink()
    session = espalier.load(plan, threads=1)
    np.testing.assert_array_equal(session.run(None, feeds())[0], [[10, 10, 11, 12]])
    assert session.get_inputs()[0].type == "tensor(float)"


def test_damaged_plans(tmp_path: Path, tiny: Graph, onnx_bytes: Callable[[Graph], bytes]) -> None:
    plan = espalier.compile(onnx_bytes(tiny), tmp_path / "model.espalier", threads=1, tune=False)
    data = plan.read_bytes()
    for place in (*range(100), *range(100, len(data), len(data) // 100)):
        plan.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(EspalierError):
            espalier.load(plan, threads=1, tune=False)
        plan.write_bytes(data[:place])
        with pytest.raises(EspalierError):
            espalier.load(plan, threads=1, tune=False)


BASE = small().SerializeToString()


def survives(data: bytes) -> None:
    """Loading ends in a session that runs or says why not, or in an Espalier exception."""
    with contextlib.suppress(EspalierError):
        espalier.load(data, threads=1, tune=False).run(None, feeds())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, len(BASE)))
def test_truncated_models(length: int) -> None:
    survives(BASE[:length])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 7)), min_size=1, max_size=4))
def test_models_with_flipped_bits(flips: list[tuple[int, int]]) -> None:
    data = bytearray(BASE)
    for place, bit in flips:
        data[place] ^= 1 << bit
    survives(bytes(data))


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_transformers_with_flipped_bits(data: st.DataObject, tiny: Graph, onnx_bytes: Callable[[Graph], bytes]) -> None:
    model = bytearray(onnx_bytes(tiny))
    for _ in range(data.draw(st.integers(1, 3))):
        model[data.draw(st.integers(0, len(model) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(EspalierError):
        session = espalier.load(bytes(model), threads=1, tune=False)
        session.run(None, {name: np.ones((1, 3), np.int64) for name in tiny.inputs})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(EspalierError):
        espalier.load(data, threads=1)


def test_a_failing_pass_costs_speed_and_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier import passes

    def fail(_graph: Graph) -> Graph:
        raise GraphError("made up")

    monkeypatch.setattr(passes, "run", fail)
    with pytest.warns(RuntimeWarning, match="a pass failed"):
        session = espalier.load(small(), threads=1)
    np.testing.assert_array_equal(session.run(None, feeds())[0], [[10, 10, 11, 12]])
    assert "made up" in session.report().layers[0].why


def test_a_segment_the_engine_refuses_goes_to_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, tiny: Graph, onnx_bytes: Callable[[Graph], bytes]
) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise UnsupportedModelError("no kernel for this")

    monkeypatch.setattr(compiler, "build", refuse)
    data = onnx_bytes(tiny)
    session = espalier.load(data, threads=1)
    assert session.run(None, {name: np.ones((2, 3), np.int64) for name in tiny.inputs})[1].shape == (2, 3)
    assert "no kernel for this" in session.report().layers[0].why
    assert len(session.report().steps) == 1
    monkeypatch.setattr(module, "_program", lambda _source, **_: Program.of(tiny, partition(tiny)))
    with pytest.raises(UnsupportedModelError, match="no kernel"):
        module._ready(Source("hf", Path("folder")), LoadSettings(threads=1, tune=False))
