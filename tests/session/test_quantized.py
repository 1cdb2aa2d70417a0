"""Models that ONNX Runtime's quantiser made: loaded, run, inspected and compiled as a user would."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import espalier
from espalier.cli import main
from espalier.ir import Graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

LINEAR = 7
Feeds = dict[str, np.ndarray]

FORMS: dict[str, dict[str, Any]] = {
    "dynamic": {"how": "dynamic"},
    "dynamic, uint8 weights per channel": {"how": "dynamic", "weight_type": "QUInt8", "per_channel": True},
    "qdq": {"how": "QDQ", "activation_type": "QUInt8"},
    "qdq per channel": {"how": "QDQ", "per_channel": True, "activation_type": "QUInt8", "weight_type": "QInt8"},
    "qdq of linear layers": {"how": "QDQ", "per_channel": True, "op_types_to_quantize": ["MatMul", "Gemm"]},
    "operators": {"how": "QOperator", "activation_type": "QUInt8"},
}


class Batches:
    """Calibration data."""

    def __init__(self, batches: list[Feeds]) -> None:
        self.left = batches

    def get_next(self) -> Feeds | None:
        return self.left.pop() if self.left else None


def quantise(source: Path, target: Path, batches: list[Feeds], *, how: str, **options: Any) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    logging.getLogger().setLevel(logging.ERROR)
    options |= {name: QuantType[value] for name, value in options.items() if name.endswith("_type")}
    if how == "dynamic":
        quantize_dynamic(source, target, **options)
    else:
        quantize_static(source, target, Batches(batches), quant_format=QuantFormat[how], **options)


@pytest.fixture(params=FORMS)
def quantised(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny: Graph,
    onnx_bytes: Callable[[Graph], bytes],
    make_feeds: Callable[..., Feeds],
) -> Path:
    """A quantised ONNX file, calibrated on full sequences."""
    source, target = tmp_path / "model.onnx", tmp_path / "quantised.onnx"
    source.write_bytes(onnx_bytes(tiny))
    batches = [make_feeds(tiny.inputs, [11, 11], seed=seed) for seed in range(8)]
    quantise(source, target, batches, **FORMS[request.param])
    return target


def test_runs_as_int8_and_agrees(quantised: Path, tiny: Graph, make_feeds: Callable[..., Feeds]) -> None:
    session = espalier.load(quantised, threads=1)
    layers = session.report().layers
    assert {layer.where for layer in layers} == {"native"}
    integers = [layer for layer in layers if layer.op == "QLinear"]
    assert len(integers) == LINEAR
    assert not [layer for layer in layers if layer.op == "Linear"]
    per_token = "MatMulInteger" in {node.op_type for node in onnx.load(quantised).graph.node}
    assert {layer.type for layer in integers} == {"int8 per token" if per_token else "int8"}

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    plain = ort.InferenceSession(str(quantised.with_name("model.onnx")), options, providers=["CPUExecutionProvider"])
    peer = ort.InferenceSession(str(quantised), options, providers=["CPUExecutionProvider"])
    feeds = make_feeds(tiny.inputs, [11, 11, 11])
    ours, theirs, exact = (each.run(None, feeds)[0] for each in (session, peer, plain))
    # Layer by layer both do the same arithmetic (tests/passes). Over a whole model they err apart, but no more.
    error = np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).mean() <= 1.5 * error
    assert np.abs(ours - theirs).mean() <= 2 * error


def test_a_sequence_does_not_depend_on_its_batch(
    quantised: Path, tiny: Graph, make_feeds: Callable[..., Feeds]
) -> None:
    session = espalier.load(quantised, threads=2)
    feeds = make_feeds(tiny.inputs, [11, 3, 7])
    together = session.run(None, feeds)
    for row, length in enumerate([11, 3, 7]):
        alone = session.run(None, {name: array[row : row + 1, :length] for name, array in feeds.items()})
        np.testing.assert_array_equal(together[0][row, :length], alone[0][0])
        np.testing.assert_array_equal(together[1][row], alone[1][0])


def test_a_plan_gives_the_same_bits(
    quantised: Path, tmp_path: Path, tiny: Graph, make_feeds: Callable[..., Feeds]
) -> None:
    plan = espalier.compile(quantised, tmp_path / "model.espalier", threads=1)
    feeds = make_feeds(tiny.inputs, [11, 3, 7])
    session, again = (espalier.load(path, threads=1) for path in (quantised, plan))
    for first, second in zip(session.run(None, feeds), again.run(None, feeds), strict=True):
        np.testing.assert_array_equal(first, second)
    described = [
        [(layer.type, layer.format, layer.sparsity, layer.why) for layer in s.report().layers] for s in (session, again)
    ]
    assert described[0] == described[1]


def test_inspect_says_int8(quantised: Path) -> None:
    found = CliRunner().invoke(main, ["inspect", str(quantised)])
    assert found.exit_code == 0, found.output
    assert found.output.count("│ int8") == LINEAR
    report = json.loads(CliRunner().invoke(main, ["inspect", str(quantised), "--json"]).output)["report"]
    formats = {layer["format"] for step in report["steps"] for layer in step["layers"] if layer["op"] == "QLinear"}
    assert formats <= {"dense8", "1x4x8", "dense", "unstructured", "4x1"}
