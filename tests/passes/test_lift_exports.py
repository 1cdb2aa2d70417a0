"""Every exporter's form of every encoder family lifts to native nodes alone, and still computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from espalier import passes
from espalier.ir.graph import Graph
from espalier.onnx import read

pytest.importorskip("onnx")

NAMES = (
    "bert", "bert without types", "bert qa", "bert classes", "bert tokens", "bert words", "sentences", "roberta",
    "roberta classes", "xlm roberta", "distilbert", "distilbert qa", "distilbert classes", "electra", "mpnet",
)  # fmt: skip

# (attention, opset) of the TorchScript exporter; scaled_dot_product_attention needs opset 14.
SCRIPT = [("eager", 11), ("eager", 14), ("eager", 17), ("sdpa", 14), ("sdpa", 17)]
QUICK = {("eager", 17), ("sdpa", 14)}


def lifted(path: Path) -> Graph:
    return passes.run(read(path))


def check(path: Path, assert_agrees: Callable[..., None], layers: int = 2) -> Graph:
    graph = lifted(path)
    assert [(n.op, n.why) for n in graph.nodes if not n.is_native] == []
    assert Counter(n.op for n in graph.nodes)["Attention"] == layers
    assert_agrees(path, graph)
    return graph


@pytest.mark.parametrize(
    ("attention", "opset"),
    [pytest.param(*form, marks=[] if form in QUICK else [pytest.mark.slow]) for form in SCRIPT],
)
@pytest.mark.parametrize("name", NAMES)
def test_torchscript(
    export: Callable[..., Path], assert_agrees: Callable[..., None], name: str, attention: str, opset: int
) -> None:
    if name == "mpnet" and opset == 11:
        pytest.skip("the exporter writes Min of int64, which opset 11 does not have")
    check(export(name, attention, opset), assert_agrees)


@pytest.mark.parametrize("name", [n if n == "bert qa" else pytest.param(n, marks=[pytest.mark.slow]) for n in NAMES])
@pytest.mark.parametrize("attention", [pytest.param("eager", marks=[pytest.mark.slow]), "sdpa"])
def test_dynamo(export: Callable[..., Path], assert_agrees: Callable[..., None], name: str, attention: str) -> None:
    check(export(name, attention, 18, dynamo=True), assert_agrees)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "sentences", "roberta"])
def test_dynamo_with_the_attention_operator(
    export: Callable[..., Path], assert_agrees: Callable[..., None], name: str
) -> None:
    path = export(name, "sdpa", 23, dynamo=True)
    assert "Attention" in {n.op for n in read(path).nodes}
    check(path, assert_agrees)


def test_the_nodes_of_a_question_answering_model(export: Callable[..., Path]) -> None:
    graph = lifted(export("bert qa", "sdpa", 17))
    assert Counter(n.op for n in graph.nodes) == {
        "Embedding": 3, "Positions": 1, "Add": 6, "LayerNorm": 5, "Linear": 13, "Attention": 2, "Activation": 2,
        "SliceFeatures": 2,
    }  # fmt: skip
    attention = next(n for n in graph.nodes if n.op == "Attention")
    assert attention.inputs[3:] == ["attention_mask", ""]
    assert attention.attrs["heads"] == 4
    assert attention.attrs["scale"] == pytest.approx(8**-0.5)
    assert {n.attrs["kind"] for n in graph.nodes if n.op == "Activation"} == {"gelu"}
    assert all(n.inputs[2] for n in graph.nodes if n.op == "Linear")


def test_pooling_and_normalisation(export: Callable[..., Path]) -> None:
    graph = lifted(export("sentences", "eager", 17))
    mean, norm = graph.nodes[-2:]
    assert (mean.op, norm.op) == ("MaskedMean", "L2Normalize")
    assert mean.inputs[1] == "attention_mask"
    assert mean.attrs["epsilon"] == pytest.approx(1e-9)
    assert norm.attrs["epsilon"] == pytest.approx(1e-12)


def test_weights_are_not_copied(export: Callable[..., Path]) -> None:
    graph = lifted(export("bert qa", "eager", 17))
    for node in graph.nodes:
        if node.op == "Linear" and graph.constants[node.inputs[1]].nbytes >= 4096:
            assert not graph.constants[node.inputs[1]].flags.owndata
            assert not graph.constants[node.inputs[1]].flags.writeable


def test_relative_positions(export: Callable[..., Path]) -> None:
    graph = lifted(export("mpnet", "eager", 17))
    bias = next(n for n in graph.nodes if n.op == "RelativeBias")
    assert bias.attrs == {"num_buckets": 32, "max_distance": 128}
    assert {n.inputs[4] for n in graph.nodes if n.op == "Attention"} == {bias.outputs[0]}


def test_unnamed_extents_get_one_name(
    export: Callable[..., Path], assert_agrees: Callable[..., None], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(export("bert qa", "eager", 17))
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    del model.graph.value_info[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = check(path, assert_agrees)
    assert len({graph.types[name].shape for name in graph.inputs}) == 1


@pytest.mark.parametrize("extents", [(3, 9), (1, None)], ids=["both", "batch"])
def test_fixed_extents(
    export: Callable[..., Path], assert_agrees: Callable[..., None], tmp_path: Path, extents: tuple[int | None, ...]
) -> None:
    import onnx

    model = onnx.load(export("bert qa", "sdpa", 17))
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, extents, strict=True):
            if size is not None:
                dim.dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = lifted(path)
    assert all(n.is_native for n in graph.nodes)
    assert_agrees(path, graph, batch=extents[0])


@pytest.mark.parametrize("keep", [False, True], ids=["half edges", "float edges"])
def test_half_precision(
    export: Callable[..., Path], assert_agrees: Callable[..., None], tmp_path: Path, keep: bool
) -> None:
    import onnx

    convert = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16
    model = convert(onnx.load(export("bert qa", "eager", 17)), keep_io_types=keep)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = lifted(path)
    assert all(n.is_native for n in graph.nodes)
    assert [graph.types[name].dtype for name in graph.outputs] == ["float32" if keep else "float16"] * 2
    assert_agrees(path, graph, tolerance=2e-3)


@pytest.mark.parametrize("name", ["bert qa", "distilbert classes"])
def test_fused_by_onnx_runtime(
    export: Callable[..., Path], assert_agrees: Callable[..., None], tmp_path: Path, name: str
) -> None:
    import onnxruntime

    source, path = export(name, "eager", 17), tmp_path / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    assert "com.microsoft" in {n.domain for n in read(path).nodes}
    check(path, assert_agrees)


def test_fused_attention_of_the_offline_optimizer(
    export: Callable[..., Path], assert_agrees: Callable[..., None], tmp_path: Path
) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    path = tmp_path / "model.onnx"
    source = str(export("bert qa", "eager", 17))
    optimizer.optimize_model(source, "bert", num_heads=4, hidden_size=32, opt_level=0).save_model_to_file(str(path))
    assert {"Attention", "EmbedLayerNormalization"} <= {n.op for n in read(path).nodes}
    graph = lifted(path)
    # This form sees a mask as the length of a right-padded sequence; a few foreign nodes say so.
    assert {n.why for n in graph.nodes if not n.is_native} == {"computes an attention mask or bias"}
    assert_agrees(path, graph)
