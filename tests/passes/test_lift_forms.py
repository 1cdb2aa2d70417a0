"""Single patterns, written as exporters and people write them; and near misses, which must stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier import passes
from espalier.ir.graph import Graph
from espalier.onnx import read

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

F = 16


class Model:
    """Builds an ONNX model over a token tensor ``x`` ``[batch, seq, F]`` and a ``mask`` ``[batch, seq]``."""

    def __init__(self, opset: int = 17, features: int = F) -> None:
        self.opset = opset
        self.rng = np.random.default_rng(1)
        self.inputs = {"x": (TensorProto.FLOAT, ["batch", "seq", features])}
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def random(self, *shape: int) -> str:
        return self.const(self.rng.normal(size=shape) * 0.5)

    def op(self, kind: str, *inputs: Any, outputs: int = 0, domain: str = "", **attrs: Any) -> Any:
        names = [i if isinstance(i, str) else self.const(i) for i in inputs]
        made = [f"v{len(self.nodes)}_{k}" for k in range(max(outputs, 1))]
        self.nodes.append(helper.make_node(kind, names, made, domain=domain, **attrs))
        return made if outputs else made[0]

    def input(self, name: str, kind: int = TensorProto.INT64, shape: tuple[Any, ...] = ("batch", "seq")) -> str:
        self.inputs[name] = (kind, list(shape))
        return name

    def linear(self, x: str, outputs: int = F, inputs: int = F) -> str:
        return str(self.op("Add", self.op("MatMul", x, self.random(inputs, outputs)), self.random(outputs)))

    def heads(self, x: str, heads: int = 4, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
        return str(self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, heads, -1)), perm=perm))

    def merged(self, x: str, width: int = F) -> str:
        return str(self.op("Reshape", self.op("Transpose", x, perm=(0, 2, 1, 3)), self.ints(0, 0, width)))

    def build(self, *outputs: str) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in self.inputs.items()],
            [helper.make_empty_tensor_value_info(n) for n in outputs],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=8))
        return bytes(model.SerializeToString())


Lift = Callable[..., Graph]


@pytest.fixture
def lift(tmp_path: Path, request: pytest.FixtureRequest) -> Lift:
    """Lift a model, hold it to ONNX Runtime on padded tokens, and return the lifted graph."""

    def run(model: Model, *outputs: str, tolerance: float = 1e-5) -> Graph:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.build(*outputs))
        graph = passes.run(read(path))
        evaluate = request.getfixturevalue("evaluate")
        rng = np.random.default_rng(2)
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
        feeds: dict[str, np.ndarray] = {}
        for name, (kind, shape) in model.inputs.items():
            sizes = [{"batch": 3, "seq": 5}.get(d, d) for d in shape]
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            feeds[name] = (rng.normal(size=sizes) if kind == TensorProto.FLOAT else mask).astype(dtype)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        expected = session.run(list(outputs), feeds)
        found = evaluate(graph, feeds)
        for name, wanted in zip(outputs, expected, strict=True):
            assert found[name].shape == wanted.shape
            np.testing.assert_allclose(found[name], wanted, rtol=tolerance, atol=tolerance)
        return graph

    return run


def ops(graph: Graph) -> list[str]:
    """Native ops in order; foreign nodes with a ``!``."""
    return [n.op if n.is_native else "!" + n.op for n in graph.nodes]


# --- activations --------------------


def gelu_torch(m: Model, x: str) -> str:
    return str(m.op("Mul", m.op("Mul", x, m.op("Add", m.op("Erf", m.op("Div", x, math.sqrt(2))), 1.0)), 0.5))


def gelu_half_first(m: Model, x: str) -> str:
    return str(m.op("Mul", m.op("Mul", 0.5, x), m.op("Add", 1.0, m.op("Erf", m.op("Mul", x, math.sqrt(0.5))))))


def gelu_half_inside(m: Model, x: str) -> str:
    inner = m.op("Add", m.op("Mul", m.op("Erf", m.op("Mul", x, math.sqrt(0.5))), 0.5), 0.5)
    return str(m.op("Mul", inner, x))


def gelu_tanh(m: Model, x: str) -> str:
    cube = m.op("Pow", x, 3.0)
    inner = m.op("Mul", m.op("Add", x, m.op("Mul", cube, 0.044715)), math.sqrt(2 / math.pi))
    return str(m.op("Mul", m.op("Mul", x, 0.5), m.op("Add", m.op("Tanh", inner), 1.0)))


def gelu_fast(m: Model, x: str) -> str:
    square = m.op("Mul", m.op("Mul", m.op("Mul", x, x), 0.044715), 0.7978845608)
    inner = m.op("Mul", x, m.op("Add", square, 0.7978845608))
    return str(m.op("Mul", m.op("Mul", m.op("Add", m.op("Tanh", inner), 1.0), x), 0.5))


def quick_gelu(m: Model, x: str) -> str:
    return str(m.op("Mul", x, m.op("Sigmoid", m.op("Mul", x, 1.702))))


def silu(m: Model, x: str) -> str:
    return str(m.op("Mul", m.op("Sigmoid", x), x))


def sigmoid_by_hand(m: Model, x: str) -> str:
    return str(m.op("Div", 1.0, m.op("Add", m.op("Exp", m.op("Neg", x)), 1.0)))


def relu_as_clip(m: Model, x: str) -> str:
    return str(m.op("Identity", m.op("Clip", x, 0.0)))


@pytest.mark.parametrize(
    ("form", "kind"),
    [(gelu_torch, "gelu"), (gelu_half_first, "gelu"), (gelu_half_inside, "gelu"), (gelu_tanh, "gelu_tanh"),
     (gelu_fast, "gelu_tanh"), (quick_gelu, "quick_gelu"), (silu, "silu"), (sigmoid_by_hand, "sigmoid"),
     (relu_as_clip, "relu")],
    ids=lambda v: getattr(v, "__name__", v),
)  # fmt: skip
def test_activations_are_known_by_what_they_compute(lift: Lift, form: Callable[[Model, str], str], kind: str) -> None:
    m = Model()
    graph = lift(m, m.op("Tanh", form(m, m.linear("x"))))
    assert ops(graph) == ["Linear", "Activation", "Activation"]
    assert graph.nodes[1].attrs == {"kind": kind}


@pytest.mark.parametrize(("attribute", "kind"), [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_the_gelu_operator(lift: Lift, attribute: str, kind: str) -> None:
    m = Model(opset=20)
    graph = lift(m, m.op("Gelu", "x", approximate=attribute))
    assert [n.attrs for n in graph.nodes] == [{"kind": kind}]


def test_almost_gelu_is_not_gelu(lift: Lift) -> None:
    m = Model()
    x = m.linear("x")
    erf = m.op("Erf", m.op("Div", x, 1.42))
    graph = lift(m, m.op("Mul", m.op("Mul", x, m.op("Add", erf, 1.0)), 0.5))
    assert "gelu" not in {n.attrs.get("kind") for n in graph.nodes}
    assert all(n.is_native for n in graph.nodes)


# --- normalisation --------------------


def norm_torch(m: Model, x: str, gamma: str, beta: str, epsilon: float) -> str:
    centred = m.op("Sub", x, m.op("ReduceMean", x, axes=[-1]))
    variance = m.op("ReduceMean", m.op("Pow", centred, 2.0), axes=[-1])
    normal = m.op("Div", centred, m.op("Sqrt", m.op("Add", variance, epsilon)))
    return str(m.op("Add", m.op("Mul", normal, gamma), beta))


def norm_squares(m: Model, x: str, gamma: str, beta: str, epsilon: float) -> str:
    centred = m.op("Sub", x, m.op("ReduceMean", x, axes=[2]))
    variance = m.op("ReduceMean", m.op("Mul", centred, centred), axes=[2])
    inverse = m.op("Reciprocal", m.op("Sqrt", m.op("Add", variance, epsilon)))
    return str(m.op("Add", beta, m.op("Mul", m.op("Mul", centred, inverse), gamma)))


def norm_tensorflow(m: Model, x: str, gamma: str, beta: str, epsilon: float) -> str:
    mean = m.op("ReduceMean", x, axes=[2])
    centred = m.op("Sub", x, mean)
    variance = m.op("ReduceMean", m.op("Mul", centred, centred), axes=[2])
    scale = m.op("Mul", m.op("Reciprocal", m.op("Sqrt", m.op("Add", variance, epsilon))), gamma)
    return str(m.op("Add", m.op("Mul", x, scale), m.op("Sub", beta, m.op("Mul", mean, scale))))


def norm_power(m: Model, x: str, gamma: str, beta: str, epsilon: float) -> str:
    centred = m.op("Sub", x, m.op("ReduceMean", x, axes=[-1]))
    variance = m.op("ReduceMean", m.op("Pow", centred, 2.0), axes=[-1])
    normal = m.op("Mul", centred, m.op("Pow", m.op("Add", variance, epsilon), -0.5))
    return str(m.op("Add", m.op("Mul", gamma, normal), beta))


@pytest.mark.parametrize("form", [norm_torch, norm_squares, norm_tensorflow, norm_power], ids=lambda f: f.__name__)
@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-3])
def test_layer_norm_is_known_by_what_it_computes(lift: Lift, form: Callable[..., str], epsilon: float) -> None:
    m = Model(opset=13)
    gamma, beta = m.random(F), m.random(F)
    graph = lift(m, m.op("Tanh", form(m, m.linear("x"), gamma, beta, epsilon)))
    assert ops(graph) == ["Linear", "LayerNorm", "Activation"]
    node = graph.nodes[1]
    assert node.attrs["epsilon"] == pytest.approx(epsilon, rel=1e-6)
    given = {t.name: numpy_helper.to_array(t) for t in m.tensors}
    np.testing.assert_allclose(graph.constants[node.inputs[1]], given[gamma], rtol=2e-7)
    np.testing.assert_allclose(graph.constants[node.inputs[2]], given[beta], rtol=2e-6, atol=1e-8)


def test_a_layer_norm_over_another_divisor_is_none(lift: Lift) -> None:
    m = Model(opset=13)
    centred = m.op("Sub", "x", m.op("ReduceMean", "x", axes=[-1]))
    variance = m.op("ReduceMean", m.op("Abs", centred), axes=[-1])
    graph = lift(m, m.op("Div", centred, m.op("Add", variance, 1e-5)))
    assert "LayerNorm" not in ops(graph)


def test_root_mean_square_norm_is_no_layer_norm(lift: Lift) -> None:
    m = Model(opset=13)
    square = m.op("ReduceMean", m.op("Mul", "x", "x"), axes=[-1])
    graph = lift(m, m.op("Mul", m.op("Div", "x", m.op("Sqrt", m.op("Add", square, 1e-6))), m.random(F)))
    assert "LayerNorm" not in ops(graph)


def test_l2_normalisation_by_hand(lift: Lift) -> None:
    m = Model(opset=13)
    norm = m.op("Sqrt", m.op("ReduceSum", m.op("Mul", "x", "x"), m.ints(-1)))
    graph = lift(m, m.op("Div", "x", m.op("Max", norm, 1e-6)))
    assert ops(graph) == ["L2Normalize"]
    assert graph.nodes[0].attrs["epsilon"] == pytest.approx(1e-6)


def test_a_norm_with_epsilon_added_is_not_the_engines(lift: Lift) -> None:
    m = Model(opset=13)
    norm = m.op("Sqrt", m.op("Add", m.op("ReduceSum", m.op("Mul", "x", "x"), m.ints(-1)), 1e-3))
    assert "L2Normalize" not in ops(lift(m, m.op("Div", "x", norm)))


# --- linear layers --------------------


def test_gemm_over_flattened_tokens(lift: Lift) -> None:
    m = Model()
    flat = m.op("Reshape", "x", m.ints(-1, F))
    made = m.op("Gemm", flat, m.random(8, F), m.random(8), transB=1, alpha=0.5, beta=2.0)
    shape = m.op("Concat", m.op("Slice", m.op("Shape", "x"), m.ints(0), m.ints(2)), m.ints(8), axis=0)
    assert ops(lift(m, m.op("Reshape", made, shape))) == ["Linear"]


@pytest.mark.parametrize("bias", ["first", "second", "scalar", "row"])
def test_bias_forms(lift: Lift, bias: str) -> None:
    m = Model()
    product = m.op("MatMul", "x", m.random(F, 8))
    vector = m.random(1, 1, 8) if bias == "row" else m.const(0.5) if bias == "scalar" else m.random(8)
    pair = (vector, product) if bias == "first" else (product, vector)
    graph = lift(m, m.op("Add", *pair))
    assert ops(graph) == (["Linear", "Add"] if bias == "scalar" else ["Linear"])


def test_scalars_are_gathered_and_applied_where_needed(lift: Lift) -> None:
    m = Model()
    graph = lift(m, m.op("Add", m.op("Mul", m.op("Div", "x", 4.0), 3.0), m.op("Sub", 2.0, "x")))
    assert all(n.is_native for n in graph.nodes)


# --- attention --------------------


def attention(m: Model, scale: str = "scores", mask: Callable[[Model, str], str] | None = None) -> str:
    q, k, v = (m.linear("x") for _ in range(3))
    if scale == "q before heads":
        q = m.op("Mul", q, 0.5)
    first, second, third = m.heads(q), m.heads(k, perm=(0, 2, 3, 1)), m.heads(v)
    if scale == "both":
        first, second = m.op("Mul", first, math.sqrt(0.5)), m.op("Mul", second, math.sqrt(0.5))
    scores = m.op("MatMul", first, second)
    if scale == "scores":
        scores = m.op("Div", scores, 2.0)
    if mask is not None:
        scores = mask(m, scores)
    return m.merged(m.op("MatMul", m.op("Softmax", scores, axis=-1), third))


@pytest.mark.parametrize("scale", ["scores", "both", "q before heads"])
def test_the_scale_may_stand_anywhere(lift: Lift, scale: str) -> None:
    m = Model()
    graph = lift(m, attention(m, scale))
    assert ops(graph) == ["Linear", "Linear", "Linear", "Attention"]
    assert graph.nodes[-1].attrs["scale"] == pytest.approx(0.5)
    assert graph.nodes[-1].inputs[3:] == ["", ""]


def mask_subtracted(m: Model, scores: str) -> str:
    spread = m.op("Cast", m.op("Unsqueeze", m.input("mask"), m.ints(1, 2)), to=1)
    return str(m.op("Add", scores, m.op("Mul", m.op("Sub", 1.0, spread), -10000.0)))


def mask_ones_times(m: Model, scores: str) -> str:
    """The outer product with ones of the original TensorFlow code."""
    row = m.op("Cast", m.op("Unsqueeze", m.input("mask"), m.ints(1)), to=1)
    ones = m.op("ConstantOfShape", m.op("Shape", m.op("Unsqueeze", "mask", m.ints(2))))
    ones = m.op("Add", ones, 1.0)
    spread = m.op("Unsqueeze", m.op("Mul", ones, row), m.ints(1))
    return str(m.op("Add", scores, m.op("Mul", m.op("Sub", 1.0, spread), -10000.0)))


def mask_filled(m: Model, scores: str) -> str:
    hidden = m.op("Equal", m.op("Reshape", m.input("mask"), m.ints(0, 1, 1, -1)), m.const(0, np.int64))
    return str(m.op("Where", m.op("Expand", hidden, m.op("Shape", scores)), -3.4e38, scores))


def mask_kept(m: Model, scores: str) -> str:
    valid = m.op("Cast", m.op("Unsqueeze", m.input("mask"), m.ints(1, 2)), to=TensorProto.BOOL)
    return str(m.op("Where", valid, scores, -np.inf))


@pytest.mark.parametrize(
    ("mask", "value"),
    [(mask_subtracted, -1e4), (mask_ones_times, -1e4), (mask_filled, -3.4e38), (mask_kept, float(np.finfo("f").min))],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_key_masks_are_known_by_what_they_compute(lift: Lift, mask: Callable[[Model, str], str], value: float) -> None:
    m = Model()
    graph = lift(m, attention(m, mask=mask))
    assert ops(graph) == ["Linear", "Linear", "Linear", "Attention"]
    assert graph.nodes[-1].inputs[3:] == ["mask", ""]
    assert graph.nodes[-1].attrs["mask_value"] == pytest.approx(value, rel=1e-6)


def causal(m: Model, scores: str) -> str:
    tokens = m.op("Gather", m.op("Shape", "x"), m.const(1, np.int64), axis=0)
    columns = m.op("Range", m.const(0, np.int64), tokens, m.const(1, np.int64))
    later = m.op("Greater", m.op("Unsqueeze", columns, m.ints(0)), m.op("Unsqueeze", columns, m.ints(1)))
    return str(m.op("Add", scores, m.op("Unsqueeze", m.op("Where", later, -10000.0, 0.0), m.ints(0, 1))))


def test_other_masks_become_a_bias(lift: Lift) -> None:
    m = Model()
    m.input("mask")
    graph = lift(m, attention(m, mask=lambda m, s: mask_subtracted(m, causal(m, s))))
    node = next(n for n in graph.nodes if n.op == "Attention")
    assert node.inputs[3] == "mask"
    assert node.inputs[4]
    assert all(n.why for n in graph.nodes if not n.is_native and n.op in ("Greater", "Where", "Range"))


def test_a_small_filled_value_is_no_mask(lift: Lift) -> None:
    """Put in a score's place, -5 is not what is added to it."""
    m = Model()

    def fill(m: Model, scores: str) -> str:
        hidden = m.op("Equal", m.op("Unsqueeze", m.input("mask"), m.ints(1, 2)), m.const(0, np.int64))
        return str(m.op("Where", hidden, -5.0, scores))

    assert "!Softmax" in ops(lift(m, attention(m, mask=fill)))


def test_softmax_over_queries_stays_foreign(lift: Lift) -> None:
    m = Model()
    q, k, v = (m.heads(m.linear("x")) for _ in range(3))
    scores = m.op("MatMul", q, m.op("Transpose", k, perm=(0, 1, 3, 2)))
    made = m.merged(m.op("MatMul", m.op("Softmax", scores, axis=2), v))
    assert "Attention" not in ops(lift(m, made))


def test_heads_folded_into_the_batch(lift: Lift) -> None:
    m = Model()
    parts = [m.op("Reshape", m.heads(m.linear("x")), m.const([-1, 5, 4], np.int64)) for _ in range(3)]
    scores = m.op("MatMul", parts[0], m.op("Transpose", parts[1], perm=(0, 2, 1)))
    mixed = m.op("MatMul", m.op("Softmax", scores, axis=-1), parts[2])
    m.inputs["x"] = (TensorProto.FLOAT, [3, 5, F])
    graph = lift(m, m.merged(m.op("Reshape", mixed, m.ints(-1, 4, 5, 4))))
    assert ops(graph) == ["Linear", "Linear", "Linear", "Attention"]


def test_one_matrix_for_q_k_and_v(lift: Lift) -> None:
    m = Model()
    parts = m.op("Split", m.linear("x", 3 * F), outputs=3, axis=-1)
    q, k, v = (m.heads(p) for p in parts)
    scores = m.op("MatMul", q, m.op("Transpose", k, perm=(0, 1, 3, 2)))
    graph = lift(m, m.merged(m.op("MatMul", m.op("Softmax", scores, axis=-1), v)))
    assert ops(graph) == ["Linear", "SliceFeatures", "SliceFeatures", "SliceFeatures", "Attention"]


def test_two_sources_are_not_one_attention(lift: Lift) -> None:
    """Keys of another length than queries: cross attention is left alone."""
    m = Model()
    m.input("other", TensorProto.FLOAT, ("batch", 7, F))
    q, k, v = m.heads(m.linear("x")), m.heads(m.linear("other")), m.heads(m.linear("other"))
    scores = m.op("MatMul", q, m.op("Transpose", k, perm=(0, 1, 3, 2)))
    assert "Attention" not in ops(lift(m, m.merged(m.op("MatMul", m.op("Softmax", scores, axis=-1), v))))


# --- pooling, heads, the rest --------------------


@pytest.mark.parametrize("form", ["gather", "gather 1-d", "slice"])
def test_the_first_token(lift: Lift, form: str) -> None:
    m = Model()
    if form == "slice":
        out = m.op("Squeeze", m.op("Slice", "x", m.ints(0), m.ints(1), m.ints(1)), m.ints(1))
    elif form == "gather":
        out = m.op("Gather", "x", m.const(0, np.int64), axis=1)
    else:
        out = m.op("Reshape", m.op("Gather", "x", m.ints(0), axis=1), m.ints(-1, F))
    assert ops(lift(m, out)) == ["SelectToken"]


def test_the_last_token_depends_on_padding(lift: Lift) -> None:
    m = Model()
    assert "SelectToken" not in ops(lift(m, m.op("Gather", "x", m.const(-1, np.int64), axis=1)))


@pytest.mark.parametrize("lowest", ["clip", "max"])
def test_mean_pooling(lift: Lift, lowest: str) -> None:
    m = Model(opset=13)
    mask = m.op("Cast", m.op("Unsqueeze", m.input("mask"), m.ints(-1)), to=1)
    total = m.op("ReduceSum", m.op("Mul", "x", mask), m.ints(1), keepdims=0)
    count = m.op("ReduceSum", mask, m.ints(1), keepdims=0)
    count = m.op("Clip", count, 1e-9) if lowest == "clip" else m.op("Max", count, 1e-9)
    graph = lift(m, m.op("Div", total, count))
    assert ops(graph) == ["MaskedMean"]
    assert graph.nodes[0].attrs["epsilon"] == pytest.approx(1e-9)


def test_a_mean_over_something_else_is_no_mean(lift: Lift) -> None:
    m = Model(opset=13)
    mask = m.op("Cast", m.op("Unsqueeze", m.input("mask"), m.ints(-1)), to=1)
    total = m.op("ReduceSum", m.op("Mul", "x", mask), m.ints(1), keepdims=0)
    count = m.op("Add", m.op("ReduceSum", mask, m.ints(1), keepdims=0), 1.0)
    assert "MaskedMean" not in ops(lift(m, m.op("Div", total, count)))


def test_probabilities_of_classes(lift: Lift) -> None:
    m = Model()
    assert ops(lift(m, m.op("Softmax", m.linear("x", 3), axis=-1))) == ["Linear", "Softmax"]


def test_spans_unstacked_along_the_first_axis(lift: Lift) -> None:
    """TensorFlow's unstack: features first, then one slice each."""
    m = Model()
    moved = m.op("Transpose", m.linear("x", 2), perm=(2, 0, 1))
    start, end = m.op("Split", moved, outputs=2, axis=0)
    outputs = [m.op("Squeeze", part, m.ints(0)) for part in (start, end)]
    graph = lift(m, *outputs)
    assert all(n.is_native for n in graph.nodes)


def test_an_unknown_operator_keeps_its_reason(lift: Lift) -> None:
    m = Model()
    graph = lift(m, m.linear(m.op("Selu", m.linear("x"))))
    assert ops(graph)[:2] == ["Linear", "!Selu"]
    assert next(n for n in graph.nodes if not n.is_native).why == "the engine has no Selu"


def test_word_embeddings_as_one_hot_products(lift: Lift) -> None:
    m = Model()
    del m.inputs["x"]
    hot = m.op("OneHot", m.input("ids"), m.const(2, np.int64), m.const([0.0, 1.0]), axis=-1)
    assert ops(lift(m, m.op("MatMul", hot, m.random(2, F)))) == ["Embedding"]


def test_a_small_image_model_is_lifted(lift: Lift) -> None:
    m = Model()
    m.inputs = {"x": (TensorProto.FLOAT, ["batch", 3, 8, 8])}
    graph = lift(m, m.op("Relu", m.op("Conv", "x", m.random(4, 3, 3, 3))))
    assert ops(graph) == ["ImageToTokens", "Unfold", "Linear", "Activation", "TokensToImage"]


def test_an_image_of_unknown_extents_is_left_alone(lift: Lift) -> None:
    m = Model()
    m.inputs = {"x": (TensorProto.FLOAT, ["batch", 3, "seq", 8])}
    graph = lift(m, m.op("Relu", m.op("Conv", "x", m.random(4, 3, 3, 3))))
    assert ops(graph) == ["!Conv", "!Relu"]


@pytest.mark.parametrize("until", ["fold", "lift", "cleanup"])
def test_passes_can_be_run_by_name(tmp_path: Path, until: str) -> None:
    m = Model()
    path = tmp_path / "model.onnx"
    path.write_bytes(m.build(m.linear("x")))
    seen: list[str] = []
    passes.run(read(path), until=until, dump=lambda name, graph: seen.append(name))
    assert seen[-1] == until
    assert seen == [step.name for step in passes.PASSES][: len(seen)]
