"""The ONNX writer against the NumPy bodies of the ops, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from espalier.errors import GraphError, ModelError, UnsupportedModelError
from espalier.ir import reference
from espalier.ir.graph import Graph, Node, TensorType
from espalier.ir.images import Window
from espalier.ir.ops import ACTIVATIONS, OPS
from espalier.onnx import writer

B, S, F, M, HEADS, VOCAB = 3, 7, 8, 12, 2, 11
RNG = np.random.default_rng(7)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


IDS = RNG.integers(0, VOCAB, (B, S))
IDS[0, 4:] = 1  # RoBERTa's padding
MASK = np.array([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6], np.int64)
X = floats(B, S, F)


def integers(dtype: str, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def int8_linear(**changes: Any) -> dict[str, np.ndarray]:
    """Constants of a QLinear with static activations."""
    base = {
        "weight": integers("int8", M, F),
        "weight_scale": np.abs(floats(M)) / 100,
        "bias": floats(M),
        "x_scale": np.float32(0.02),
        "x_zero": np.int8(-11),
    }
    return {name: array for name, array in {**base, **changes}.items() if array is not None}


# One token: the range of the tensor, which is what ONNX knows, is then that of the token.
ONE_TOKEN = floats(1, 1, F)
PER_TOKEN = {"x_scale": None, "x_zero": None}

ROWS, COLUMNS = 4, 5
PIXELS = floats(B, ROWS * COLUMNS, F)
NOT_FINITE = PIXELS.copy()
NOT_FINITE[0, 6], NOT_FINITE[1, 0, 2], NOT_FINITE[2, -1] = np.inf, np.nan, -np.inf


def window(result: tuple[int, int], kernel: tuple[int, int], **others: tuple[int, int]) -> dict[str, Any]:
    return {"window": Window((ROWS, COLUMNS), result, kernel, **others).numbers}


WINDOWS: dict[str, dict[str, Any]] = {
    "a plain window": window((3, 4), (2, 2)),
    "one pixel": window((ROWS, COLUMNS), (1, 1)),
    "edges": window((4, 5), (3, 3), before=(1, 1)),
    "edges on one side": window((4, 5), (2, 3), before=(0, 2)),
    "a stride that leaves pixels over": window((2, 2), (1, 2), stride=(2, 3)),
    "a stride and edges": window((2, 3), (3, 3), stride=(2, 2), before=(1, 1)),
    "dilation": window((2, 3), (2, 2), dilation=(2, 2)),
    "dilation and edges": window((4, 5), (3, 3), dilation=(2, 2), before=(2, 2)),
    "edges as wide as the kernel": window((6, 7), (3, 2), dilation=(2, 2), before=(4, 2)),
    "fewer outputs than fit": window((2, 1), (2, 2)),
    "edges as wide as the kernel and fewer outputs than fit": window((4, 2), (2, 2), dilation=(2, 1), before=(2, 0)),
}

Case = tuple[str, dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]
"""Op, attributes, operands that are inputs, operands that are constants (in the spec's order when merged)."""

CASES: dict[str, Case] = {
    "positions": ("Positions", {"offset": 2}, {"ids": IDS}, {}),
    "positions from int32": ("Positions", {"offset": 0}, {"ids": IDS.astype(np.int32)}, {}),
    "positions from ids": ("PositionsFromIds", {"padding_idx": 1}, {"ids": IDS}, {}),
    "positions from int32 ids": ("PositionsFromIds", {"padding_idx": 1}, {"ids": IDS.astype(np.int32)}, {}),
    "embedding": ("Embedding", {}, {"ids": IDS}, {"table": floats(VOCAB, F)}),
    "relative bias": ("RelativeBias", {"num_buckets": 8, "max_distance": 5}, {"ids": IDS}, {"table": floats(8, HEADS)}),
    "linear": ("Linear", {}, {"x": X}, {"weight": floats(M, F), "bias": floats(M)}),
    "linear without bias": ("Linear", {}, {"x": floats(B, F)}, {"weight": floats(M, F)}),
    "int8 linear": ("QLinear", {"activations": "static"}, {"x": X}, int8_linear()),
    "int8 linear, all unsigned, without bias": (
        "QLinear",
        {"activations": "static"},
        {"x": X},
        int8_linear(weight=integers("uint8", M, F), weight_zero=integers("uint8", M), bias=None, x_zero=np.uint8(131)),
    ),
    "int8 linear, one scale, zero points by row": (
        "QLinear",
        {"activations": "static"},
        {"x": X},
        int8_linear(weight_scale=np.float32(0.01), weight_zero=integers("int8", M)),
    ),
    "int8 linear per token": ("QLinear", {"activations": "token"}, {"x": ONE_TOKEN}, int8_linear(**PER_TOKEN)),
    "int8 linear per token, zero points by row": (
        "QLinear",
        {"activations": "token"},
        {"x": ONE_TOKEN},
        int8_linear(weight_zero=integers("int8", M), bias=None, **PER_TOKEN),
    ),
    "fake quantize": (
        "FakeQuantize",
        {},
        {"x": X},
        {"scale": np.float32(0.02), "zero": np.uint8(100)},
    ),
    "layer norm": ("LayerNorm", {"epsilon": 1e-12}, {"x": X}, {"gamma": floats(F), "beta": floats(F)}),
    "layer norm without beta": ("LayerNorm", {"epsilon": 1e-5}, {"x": floats(B, F)}, {"gamma": floats(F)}),
    "add": ("Add", {}, {"x": X, "y": floats(B, S, F)}, {}),
    "add over the batch": ("Add", {}, {"x": X, "y": floats(1, S, F)}, {}),
    "sub of features": ("Sub", {}, {"x": X}, {"y": floats(F)}),
    "mul by a scalar": ("Mul", {}, {"x": X}, {"y": np.float32(3)}),
    "div": ("Div", {}, {"x": X, "y": 2 + np.abs(floats(B, S, F))}, {}),
    "attention": (
        "Attention",
        {"heads": HEADS, "scale": 0.5, "mask_value": 0.0},
        {"q": X, "k": floats(B, S, F), "v": floats(B, S, 6)},
        {},
    ),
    "attention with mask and bias": (
        "Attention",
        {"heads": HEADS, "scale": 0.5, "mask_value": float(np.finfo(np.float32).min)},
        {"q": X, "k": X, "v": X, "key_mask": MASK, "bias": floats(1, HEADS, S, S)},
        {},
    ),
    "attention that masks with infinity": (
        "Attention",
        {"heads": HEADS, "scale": 0.5, "mask_value": -np.inf},
        {"q": X, "k": X, "v": X, "key_mask": MASK.astype(bool)},
        {},
    ),
    "select token": ("SelectToken", {"index": 0}, {"x": X}, {}),
    "select the last token": ("SelectToken", {"index": -1}, {"x": X}, {}),
    "masked mean": ("MaskedMean", {"epsilon": 1e-9}, {"x": X, "mask": MASK}, {}),
    "mean": ("MaskedMean", {"epsilon": 1e-9}, {"x": X}, {}),
    "mean of less than epsilon": ("MaskedMean", {"epsilon": 20}, {"x": X}, {}),
    "max": ("Max", {}, {"x": X, "y": floats(B, S, F)}, {}),
    "max over the batch": ("Max", {}, {"x": X, "y": floats(1, S, F)}, {}),
    "max with a scalar": ("Max", {}, {"x": NOT_FINITE}, {"y": np.float32(0.5)}),
    "min of features": ("Min", {}, {"x": NOT_FINITE}, {"y": floats(F)}),
    "image to tokens": ("ImageToTokens", {}, {"x": floats(B, F, ROWS, COLUMNS)}, {}),
    "tokens to image": ("TokensToImage", {"rows": ROWS, "columns": COLUMNS}, {"x": PIXELS}, {}),
    "unfold to whole blocks": ("Unfold", {**WINDOWS["a plain window"], "align": 4}, {"x": PIXELS}, {}),
    "unfold to longer blocks": ("Unfold", {**WINDOWS["edges"], "align": 5}, {"x": PIXELS}, {}),
    "max pool of infinities": ("MaxPool", WINDOWS["edges"], {"x": np.where(np.isnan(NOT_FINITE), 0, NOT_FINITE)}, {}),
    # MaxPool has no such case: ONNX Runtime gives the lowest finite number where there is nothing but edges.
    "mean pool beyond the edges": (
        "MeanPool",
        {**window((8, 2), (2, 2), before=(2, 0)), "count_edges": False},
        {"x": PIXELS},
        {},
    ),
    "concat": ("Concat", {}, {"x0": X, "x2": floats(B, S, 1), "x3": floats(B, S, 5)}, {}),
    "concat of sequences": ("Concat", {}, {"x0": floats(B, 2), "x1": floats(B, F)}, {}),
    "concat of one": ("Concat", {}, {"x0": X}, {}),
    "spread": ("Spread", {"tokens": 6}, {"x": floats(B, F)}, {}),
    "l2 normalize": ("L2Normalize", {"epsilon": 1e-12}, {"x": floats(B, F)}, {}),
    "softmax": ("Softmax", {}, {"x": X}, {}),
    "slice": ("SliceFeatures", {"start": 2, "stop": 5, "squeeze": False}, {"x": X}, {}),
    "slice and squeeze": ("SliceFeatures", {"start": 3, "stop": 4, "squeeze": True}, {"x": X}, {}),
    "cast": ("Cast", {"dtype": "float16"}, {"x": X}, {}),
}
CASES |= {f"activation {kind}": ("Activation", {"kind": kind}, {"x": np.abs(X) + 0.1}, {}) for kind in ACTIVATIONS}
for of, shape in WINDOWS.items():
    CASES |= {
        f"unfold, {of}": ("Unfold", {**shape, "align": 1}, {"x": NOT_FINITE}, {}),
        f"max pool, {of}": ("MaxPool", shape, {"x": PIXELS}, {}),
        f"mean pool, {of}": ("MeanPool", {**shape, "count_edges": False}, {"x": NOT_FINITE}, {}),
        f"mean pool that counts edges, {of}": ("MeanPool", {**shape, "count_edges": True}, {"x": NOT_FINITE}, {}),
    }


def graph_of(case: Case) -> Graph:
    op, attrs, feeds, constants = case
    operands = {**feeds, **constants}
    order = [spec.name for spec in OPS[op].inputs]
    inputs = [name if name in operands else "" for name in order]
    while inputs and not inputs[-1]:
        inputs.pop()
    types = {name: TensorType(array.dtype.name, tuple(np.shape(array))) for name, array in operands.items()}
    types["out"] = OPS[op].infer([types.get(name) for name in inputs], attrs)
    node = Node(op, inputs, ["out"], attrs)
    return Graph(op, list(feeds), ["out"], [node], {k: np.asarray(v) for k, v in constants.items()}, types)


def run_onnx(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


@pytest.mark.parametrize("name", CASES)
def test_every_op_means_the_same_in_onnx(name: str) -> None:
    graph = graph_of(CASES[name])
    want = reference.run(graph, CASES[name][2])["out"]
    model = writer.to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    (got,) = run_onnx(model, CASES[name][2])
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), atol=2e-5, rtol=2e-5)


def test_the_cases_cover_every_op() -> None:
    assert {case[0] for case in CASES.values()} == set(OPS)


def linear_graph() -> Graph:
    return graph_of(CASES["linear"])


@pytest.mark.parametrize(("case", "op"), [("max pool", "MaxPool"), ("mean pool", "AveragePool")])
def test_pools_stay_pools(case: str, op: str) -> None:
    """So that other runtimes know them, and the importer too."""
    for of in ("a plain window", "edges", "edges on one side", "a stride that leaves pixels over"):
        model = writer.to_model(graph_of(CASES[f"{case}, {of}"]))
        assert [node.op_type for node in model.graph.node] == ["Transpose", "Reshape", op, "Reshape", "Transpose"]


def test_blocks_of_unknown_length_are_refused() -> None:
    graph = graph_of(CASES["unfold to longer blocks"])
    graph.types["x"] = TensorType("float32", (B, ROWS * COLUMNS, "?"))
    with pytest.raises(GraphError, match="must know the features of 'x'"):
        writer.to_model(graph)


def test_readers_of_one_value_share_its_quantisation() -> None:
    for case, op in (("int8 linear", "QuantizeLinear"), ("int8 linear per token", "DynamicQuantizeLinear")):
        graph = graph_of(CASES[case])
        first = graph.nodes[0]
        again = [f"{name} again" if name in ("x_scale", "x_zero") else name for name in first.inputs]
        graph.constants |= {
            f"{name} again": graph.constants[name] for name in ("x_scale", "x_zero") if name in first.inputs
        }
        graph.nodes.append(Node("QLinear", again, ["second"], first.attrs))
        graph.types["second"] = graph.types["out"]
        graph.outputs.append("second")
        assert [node.op_type for node in writer.to_model(graph).graph.node].count(op) == 1


def test_symbolic_extents_stay_symbolic() -> None:
    graph = linear_graph()
    graph.types["x"] = TensorType("float32", ("batch", "?1", F))
    graph.types["out"] = TensorType("float32", ("batch", "?1", M))
    model = writer.to_model(graph)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert not dims[1].HasField("dim_param")
    assert dims[2].dim_value == F
    assert run_onnx(model, {"x": floats(5, 2, F)})[0].shape == (5, 2, M)


def test_a_weight_used_twice_is_written_once() -> None:
    graph = linear_graph()
    graph.nodes.append(Node("Linear", ["x", "weight"], ["again"], {}))
    graph.types["again"] = graph.types["out"]
    graph.outputs.append("again")
    model = writer.to_model(graph)
    assert sorted(tensor.name.split(".")[0] for tensor in model.graph.initializer) == ["bias", "weight"]


def test_foreign_nodes_keep_their_opset() -> None:
    graph = linear_graph()
    proto = onnx.helper.make_node("Gelu", ["out"], ["y"])
    graph.nodes.append(Node("Gelu", ["out"], ["y"], domain="", proto=proto))
    graph.types["y"] = graph.types["out"]
    graph.outputs, graph.opsets = ["y"], {"": 20}
    model = writer.to_model(graph)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert run_onnx(model, {"x": X})[0].shape == (B, S, M)


def test_foreign_nodes_of_an_old_opset_are_refused() -> None:
    graph = linear_graph()
    graph.nodes.append(Node("Relu", ["out"], ["y"], domain="", proto=onnx.helper.make_node("Relu", ["out"], ["y"])))
    graph.opsets = {"": 11}
    with pytest.raises(UnsupportedModelError, match="version_converter"):
        writer.to_model(graph)


def test_an_unknown_native_op_is_refused() -> None:
    graph = linear_graph()
    graph.nodes[0].op = "Convolve"
    with pytest.raises(GraphError, match="Convolve"):
        writer.to_model(graph)


def test_write_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = writer.write(linear_graph(), tmp_path / "new" / "model.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert run_onnx(path, {"x": X})[0].shape == (B, S, M)


def test_large_models_keep_their_tensors_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_EXTERNAL_FROM", 0)
    graph = graph_of(("Linear", {}, {"x": floats(B, 64)}, {"weight": floats(64, 64)}))
    path = writer.write(graph, tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    feeds = {"x": floats(B, 64)}
    np.testing.assert_allclose(run_onnx(path, feeds)[0], reference.run(graph, feeds)["out"], atol=1e-4)


def test_a_place_that_cannot_be_written_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="cannot write"):
        writer.write(linear_graph(), tmp_path / "file" / "model.onnx")
