"""A tiny encoder as an ONNX file, and a runner for the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from espalier.cli import main
from espalier.ir.graph import Graph, Node, TensorType
from espalier.onnx import writer

VOCABULARY, POSITIONS, FEATURES = 40, 24, 16

Run = Callable[..., Result]


def encoder() -> Graph:
    """Embeddings, one attention, a pruned linear layer and a mean: ids and mask to ``[batch, 16]``."""
    rng = np.random.default_rng(3)
    shapes = {
        "words": (VOCABULARY, FEATURES),
        "places": (POSITIONS, FEATURES),
        "gamma": (FEATURES,),
        "w": (FEATURES,) * 2,
    }
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    constants["w"][rng.random(shapes["w"]) < 0.9] = 0
    tokens = ("batch", "seq", FEATURES)
    nodes = [
        Node("Embedding", ["words", "input_ids"], ["a"]),
        Node("Positions", ["input_ids"], ["p"], {"offset": 0}),
        Node("Embedding", ["places", "p"], ["b"]),
        Node("Add", ["a", "b"], ["c"]),
        Node("LayerNorm", ["c", "gamma"], ["d"], {"epsilon": 1e-5}),
        Node("Linear", ["d", "w"], ["q"]),
        Node("Attention", ["q", "d", "d", "attention_mask"], ["e"], {"heads": 2, "scale": 0.3, "mask_value": -1e4}),
        Node("MaskedMean", ["e", "attention_mask"], ["embedding"], {"epsilon": 1e-9}),
    ]
    for node in nodes:
        node.name = node.outputs[0]
    types = {name: TensorType("float32", array.shape) for name, array in constants.items()}
    types |= {name: TensorType("int64", ("batch", "seq")) for name in ("input_ids", "attention_mask")}
    types |= {name: TensorType("float32", tokens) for name in "acdqe"}
    types |= {"p": TensorType("int64", (1, "seq")), "b": TensorType("float32", (1, "seq", FEATURES))}
    types["embedding"] = TensorType("float32", ("batch", FEATURES))
    return Graph("tiny", ["input_ids", "attention_mask"], ["embedding"], nodes, constants, types)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writer.write(encoder(), tmp_path_factory.mktemp("models") / "tiny.onnx")


@pytest.fixture(scope="session")
def model8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its linear layer in 8 bits."""
    graph = encoder()
    weight = graph.constants.pop("w")
    scale = np.float32(np.abs(weight).max() / 127)
    parts = {
        "w8": np.round(weight / scale).astype(np.int8), "w8.scale": np.full(FEATURES, scale), "w8.zero": np.int8(0),
        "bias": np.zeros(FEATURES, np.float32), "d.scale": np.float32(0.02), "d.zero": np.uint8(128),
    }  # fmt: skip
    graph.constants |= {name: np.asarray(value) for name, value in parts.items()}
    graph.types |= {name: TensorType(str(array.dtype), array.shape) for name, array in graph.constants.items()}
    (layer,) = (node for node in graph.nodes if node.op == "Linear")
    layer.op, layer.inputs, layer.attrs = "QLinear", ["d", *parts], {"activations": "static"}
    return writer.write(graph, tmp_path_factory.mktemp("models") / "tiny8.onnx")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "in.npz"
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    np.savez(path, input_ids=mask * 7, attention_mask=mask)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def run_json(run: Run) -> Callable[..., dict[str, object]]:
    """Run the command and parse all of its standard output as JSON."""

    def invoke(*arguments: object) -> dict[str, object]:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        value: dict[str, object] = json.loads(result.stdout)
        return value

    return invoke
