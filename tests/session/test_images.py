"""Convolutional networks against ONNX Runtime: every form of a convolution, and what stands between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.exact_products import unsaturated

import espalier
from espalier import passes
from espalier.compiler.native import NativeProgram
from espalier.onnx import read
from espalier.passes.partition import NativeSegment, OrtSegment, partition

onnxruntime = pytest.importorskip("onnxruntime", reason="the reference of every model")

SIZE = (3, 15, 18)
"""Channels, rows and columns of the input ``x``."""


class Net:
    """An ONNX graph over images ``x``, value by value."""

    def __init__(self, *, channels: int = SIZE[0], opset: int = 17, seed: int = 0, dtype: type = np.float32) -> None:
        self.random = np.random.default_rng(seed)
        self.channels, self.opset, self.dtype = channels, opset, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype or self.dtype), name))
        return name

    def op(self, op: str, *inputs: str, domain: str = "", **attrs: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attrs))
        return name

    def normal(self, *shape: int) -> str:
        return self.constant(self.random.normal(size=shape))

    def weight(self, *shape: int, zeros: float = 0.6) -> str:
        array = self.random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        return self.constant(np.where(self.random.random(shape) < zeros, 0, array))

    def conv(self, x: str, inputs: int, outputs: int, kernel: int | tuple[int, int] = 3, **attrs: Any) -> str:
        shape = (kernel, kernel) if isinstance(kernel, int) else kernel
        attrs.setdefault("pads", [n // 2 for n in shape] * 2)
        if "auto_pad" in attrs:
            del attrs["pads"]
        return self.op("Conv", x, self.weight(outputs, inputs, *shape), self.normal(outputs), **attrs)

    def pooled(self, x: str, features: int) -> str:
        flat = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.op("Gemm", flat, self.normal(10, features), self.normal(10), transB=1)

    def build(self, *outputs: str, size: tuple[int, int] | Sequence[str] = SIZE[1:]) -> bytes:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = helper.make_graph(
            self.nodes,
            "images",
            [helper.make_tensor_value_info("x", kind, ["batch", self.channels, *size])],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 9
        return onnx.shape_inference.infer_shapes(model).SerializeToString()


def images(batch: int = 2, channels: int = SIZE[0], size: tuple[int, int] = SIZE[1:]) -> np.ndarray:
    return np.random.default_rng(batch).normal(size=(batch, channels, *size)).astype(np.float32)


def expected(model: bytes, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    exact = unsaturated(onnx.load_from_string(model)).SerializeToString()
    session = onnxruntime.InferenceSession(exact, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


@pytest.fixture
def native(tmp_path: Path) -> Callable[..., NativeProgram]:
    """``native(model)``: the whole model in the engine, whether that pays or not."""

    def compiled(model: bytes, threads: int = 2) -> NativeProgram:
        path = tmp_path / "model.onnx"
        path.write_bytes(model)
        graph = passes.run(read(path))
        foreign = [f"{node.op}: {node.why}" for node in graph.nodes if not node.is_native]
        assert not foreign
        (step,) = partition(graph)
        assert isinstance(step, NativeSegment)
        return NativeProgram(step.graph, threads=threads, tune=False)

    return compiled


Compile = Callable[..., NativeProgram]


def answer(program: NativeProgram, x: np.ndarray) -> np.ndarray:
    """The one output."""
    (found,) = program.run({"x": x}).values()
    return found


def check(
    native: Compile, model: bytes, *, batches: Sequence[int] = (1, 2), tolerance: float = 2e-6, **kw: Any
) -> None:
    """The model runs natively, and its answers are ONNX Runtime's."""
    program = native(model)
    for batch in batches:
        x = images(batch, **kw)
        wanted = expected(model, x)
        found = list(program.run({"x": x}).values())
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1.0, np.abs(theirs).max()), rtol=0)


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"kernel": 1},
        {"kernel": 1, "strides": [2, 2]},
        {"kernel": 1, "strides": [2, 1]},
        {"strides": [2, 2]},
        {"strides": [3, 2]},
        {"strides": [1, 5], "kernel": 5},
        {"pads": [0, 0, 0, 0]},
        {"pads": [2, 0, 1, 3]},
        {"pads": [7, 7, 7, 7], "kernel": 7},
        {"kernel": (1, 7)},
        {"kernel": (5, 2), "pads": [1, 1, 2, 0]},
        {"dilations": [2, 3], "pads": [2, 3, 2, 3]},
        {"kernel": (15, 18), "pads": [0, 0, 0, 0]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2], "kernel": 4},
        {"auto_pad": "VALID", "kernel": 5},
    ],
    ids=str,
)
def test_a_convolution(native: Compile, attrs: dict[str, Any]) -> None:
    net = Net()
    check(native, net.build(net.conv("x", 3, 5, **attrs)), batches=(1, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (7, 7), (9, 129)])
def test_an_image_of_any_size(native: Compile, size: tuple[int, int]) -> None:
    net = Net()
    y = net.op("Relu", net.conv("x", 3, 9, strides=[2, 2] if min(size) > 1 else [1, 1]) if size != (1, 1) else "x")
    if size == (1, 1):
        y = net.conv(y, 3, 9, 1)
    check(native, net.build(net.conv(y, 9, 4, 1), size=size), size=size)


def residual_network(net: Net, width: int = 16) -> str:
    def normalised(x: str, features: int) -> str:
        scale, shift, mean = (net.normal(features) for _ in range(3))
        return net.op("BatchNormalization", x, scale, shift, mean, net.constant(net.random.uniform(0.5, 2, features)))

    x = net.op("Conv", "x", net.weight(width, 3, 7, 7), strides=[2, 2], pads=[3] * 4)
    x = net.op("Relu", normalised(x, width))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.op("Relu", normalised(net.conv(x, width, width), width))
    x = net.op("Relu", net.op("Add", normalised(net.conv(y, width, width), width), x))
    y = net.op("Relu", net.conv(x, width, 2 * width, strides=[2, 2]))
    y = net.op("Add", net.conv(y, 2 * width, 2 * width), net.conv(x, width, 2 * width, 1, strides=[2, 2]))
    return net.pooled(net.op("Relu", y), 2 * width)


def test_a_residual_network(native: Compile) -> None:
    net = Net()
    check(native, net.build(residual_network(net)), batches=(1, 2, 3, 7), tolerance=1e-5)


def test_an_image_does_not_depend_on_its_batch(native: Compile) -> None:
    net = Net()
    model = net.build(residual_network(net))
    x = images(5)
    alone = np.concatenate([answer(native(model, threads=1), row[None]) for row in x])
    for threads in (1, 2, 3):
        program = native(model, threads=threads)
        for batch in (1, 2, 5):
            np.testing.assert_array_equal(answer(program, x[:batch]), alone[:batch])


def test_no_images(native: Compile) -> None:
    net = Net()
    model = net.build(residual_network(net), net.conv("x", 3, 4))
    found = native(model).run({"x": images(0)})
    assert [array.shape for array in found.values()] == [(0, 10), (0, 4, *SIZE[1:])]


# --- what stands between convolutions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("MaxPool", {"kernel_shape": [3, 3], "dilations": [2, 2]}),
        ("MaxPool", {"kernel_shape": [5, 5], "auto_pad": "SAME_UPPER"}),
        ("AveragePool", {"kernel_shape": [2, 3], "strides": [2, 2]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("ReduceMean", {"axes": [2, 3], "keepdims": 0}),
        ("ReduceMean", {"axes": [-1, -2]}),
        ("LeakyRelu", {"alpha": 0.1}),
        ("HardSigmoid", {"alpha": 0.3}),
        ("HardSwish", {}),
        ("Sigmoid", {}),
    ],
    ids=str,
)
def test_a_layer_of_its_own(native: Compile, op: str, attrs: dict[str, Any]) -> None:
    net = Net()
    check(native, net.build(net.op(op, net.conv("x", 3, 6), **attrs)))


def test_pools_see_no_edges(native: Compile) -> None:
    """The largest of negative numbers is none of the zeros around them."""
    net = Net()
    y = net.op("Sub", net.conv("x", 3, 6), net.constant(100.0))
    check(native, net.build(net.op("MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4)))


@pytest.mark.parametrize("limits", [(0.0, 6.0), (-0.5, 0.5), (None, 0.25), (0.1, None)])
def test_clipped(native: Compile, limits: tuple[float | None, float | None]) -> None:
    net = Net()
    given = [net.constant(limit) if limit is not None else "" for limit in limits]
    check(native, net.build(net.op("Clip", net.conv("x", 3, 6), *given)))


def test_squeeze_and_excitation(native: Compile) -> None:
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 8))
    gate = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), 8, 4, 1))
    gate = net.op("Sigmoid", net.conv(gate, 4, 8, 1))
    check(native, net.build(net.conv(net.op("Mul", x, gate), 8, 5)), batches=(1, 4))


def test_branches_are_concatenated(native: Compile) -> None:
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 8))
    parts = [net.conv(x, 8, n, k) for n, k in ((3, 1), (6, 3), (2, 5))]
    wide = net.op("Concat", *parts, net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), axis=1)
    check(native, net.build(net.conv(wide, 19, 4)))


def test_constants_per_channel(native: Compile) -> None:
    net = Net()
    y = net.op("Mul", net.conv("x", 3, 6), net.normal(1, 6, 1, 1))
    y = net.op("Sub", net.normal(6, 1, 1), net.op("Add", y, net.normal(6, 1, 1)))
    check(native, net.build(net.op("Div", y, net.constant(3.0))))


def test_images_and_vectors_as_outputs(native: Compile) -> None:
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 8))
    check(native, net.build(x, net.op("GlobalAveragePool", x), net.pooled(x, 8), net.conv(x, 8, 4, strides=[2, 2])))


def test_a_layer_between_runs_in_onnx_runtime() -> None:
    """What the engine lacks stays foreign, and reads images as ONNX has them."""
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 64))
    x = net.op("Relu", net.conv(x, 64, 64))
    y = net.op("Resize", x, "", net.constant([1, 1, 2, 2]), mode="nearest")
    net.constants = [_sparse(tensor) for tensor in net.constants]
    model = net.build(net.conv(y, 64, 8, 1))
    session = espalier.load(model, threads=2)
    assert {layer.where for layer in session.report().layers} == {"native", "ONNX Runtime"}
    np.testing.assert_allclose(session.run(None, {"x": images(2)})[0], expected(model, images(2))[0], atol=1e-5)


def _sparse(tensor: onnx.TensorProto) -> onnx.TensorProto:
    array = numpy_helper.to_array(tensor).copy()
    if array.ndim == 4:
        array[np.random.default_rng(0).random(array.shape) < 0.95] = 0
    return numpy_helper.from_array(array, tensor.name)


def test_half_precision(native: Compile) -> None:
    net = Net(dtype=np.float16)
    y = net.op("Cast", "x", to=TensorProto.FLOAT)
    net.dtype = np.float32
    y = net.conv(y, 3, 4)
    net.dtype = np.float16
    model = net.build(y)
    session = espalier.load(model)
    x = images(2).astype(np.float16)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(model, x)[0], atol=1e-5)


# --- eight bits ------------------------------------------------------------------------------------------------------


class Calibration:
    def __init__(self) -> None:
        self.batches = iter([{"x": images(n)} for n in (2, 3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantized(model: bytes, folder: Path, form: str) -> bytes:
    """The model as ONNX Runtime's quantiser writes it."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="the quantiser")
    source, target = folder / "float.onnx", folder / "quantised.onnx"
    source.write_bytes(model)
    kind, _, types = form.partition(" ")
    types, _, channels = types.partition(" ")
    integer = {"u8": quantization.QuantType.QUInt8, "s8": quantization.QuantType.QInt8}
    if kind == "dynamic":
        quantization.quantize_dynamic(source, target, weight_type=integer[types])
    else:
        quantization.quantize_static(
            source,
            target,
            Calibration(),
            quant_format=quantization.QuantFormat[kind],
            activation_type=integer[types[:2]],
            weight_type=integer[types[2:]],
            per_channel=bool(channels),
        )
    return target.read_bytes()


FORMS = ("QDQ u8u8", "QDQ u8s8 channels", "QDQ s8s8", "QOperator u8u8", "QOperator u8s8 channels")


def plain_network(net: Net) -> str:
    """Without normalisation, which the quantiser keeps apart."""
    x = net.op("Relu", net.conv("x", 3, 12, strides=[2, 2]))
    x = net.op("MaxPool", x, kernel_shape=[2, 2])
    y = net.op("Relu", net.conv(x, 12, 13))
    x = net.op("Add", net.conv(y, 13, 12, (3, 1)), net.conv(x, 12, 12, 1))
    x = net.op("Concat", net.op("LeakyRelu", x), net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4), axis=1)
    return net.pooled(x, 24)


@pytest.mark.parametrize("form", FORMS)
def test_quantised_networks_round_like_onnx_runtime(native: Compile, tmp_path: Path, form: str) -> None:
    net = Net()
    model = quantized(net.build(plain_network(net)), tmp_path, form)
    program = native(model)
    kinds = [layer.type for layer in program.layers()]
    assert kinds == ["int8"] * len(kinds)
    for batch in (1, 3):
        x = images(batch)
        ours, theirs = answer(program, x), expected(model, x)[0]
        # Sums that fall between two integers may go either way, and a step of the last layer is what shows of that.
        step = np.diff(np.unique(theirs)).min()
        assert np.abs(ours - theirs).max() <= 1.01 * step
        assert np.mean(ours == theirs) >= 0.8


@pytest.mark.parametrize("types", ["u8", "s8"])
def test_dynamically_quantised_networks(native: Compile, tmp_path: Path, types: str) -> None:
    """Every window has its own scale here, and the whole batch one in ONNX Runtime."""
    net = Net()
    float_model = net.build(residual_network(net))
    model = quantized(float_model, tmp_path, f"dynamic {types}")
    program = native(model)
    assert {layer.type for layer in program.layers()} == {"int8 per token"}
    x = images(2)
    ours, theirs, exact = answer(program, x), expected(model, x)[0], expected(float_model, x)[0]
    assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("zero", [0, 3, 255])
def test_a_convolution_of_bytes(native: Compile, zero: int) -> None:
    """Exactly: edges are zeros of the float image, not of the bytes."""
    net = Net()
    weight = net.random.integers(0, 256, (8, 3, 3, 3))
    names = [
        net.constant(0.02),
        net.constant(zero, np.uint8),
        net.constant(weight, np.uint8),
        net.constant(0.01),
        net.constant(130, np.uint8),
        net.constant(0.1),
        net.constant(7, np.uint8),
        net.constant(net.random.integers(-9000, 9000, 8), np.int32),
    ]
    q = net.op("QuantizeLinear", "x", *names[:2])
    y = net.op("QLinearConv", q, *names[:2], *names[2:5], *names[5:], pads=[1, 2, 1, 0], strides=[2, 1])
    model = net.build(net.op("DequantizeLinear", y, *names[5:7]))
    ours, theirs = answer(native(model), images(2)), expected(model, images(2))[0]
    assert np.mean(ours != theirs) < 5e-3  # a sum in 500 falls between two integers
    np.testing.assert_allclose(ours, theirs, atol=0.101)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_block_stays_in_bytes(native: Compile, zero: int) -> None:
    """A pool, two convolutions and their sum: nothing is a float in between."""
    net = Net(channels=8)
    parts = [net.constant(0.04), net.constant(zero, np.uint8)]

    def rounded(x: str) -> str:
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, *parts), *parts)

    def conv(x: str) -> str:
        weight = [net.constant(net.random.integers(-127, 128, (8, 8, 3, 3)), np.int8), net.constant(0.002)]
        weight.append(net.constant(0, np.int8))
        return net.op("Conv", x, net.op("DequantizeLinear", *weight), net.normal(8), pads=[1] * 4)

    x = rounded(net.op("MaxPool", rounded("x"), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))
    y = rounded(net.op("Relu", net.op("Add", rounded(conv(x)), rounded(conv(x)))))
    model = net.build(conv(rounded(net.op("Add", x, y))))
    program = native(model)
    given = images(2, channels=8)
    ours, theirs = answer(program, given), expected(model, given)[0]
    assert np.mean(np.abs(ours - theirs) > 1e-4) < 0.1  # where no rounding before it fell the other way
    np.testing.assert_allclose(ours, theirs, atol=0.1)
    assert [row.name.partition(":")[0] for row in program.profile()].count("quantize") == 1


def test_sums_at_the_limits(native: Compile) -> None:
    """Products that saturate in 16 bits where instructions add them in pairs."""
    net = Net(channels=64)
    names = [net.constant(1 / 255), net.constant(0, np.uint8)]
    weight = np.full((4, 64, 3, 3), 127)
    weight[1], weight[2, :, 0] = -127, -127
    w = [net.constant(weight, np.int8), net.constant(0.001), net.constant(0, np.int8)]
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", *names), *names)
    model = net.build(net.op("Conv", x, net.op("DequantizeLinear", *w), pads=[1] * 4))
    x = np.ones((1, 64, *SIZE[1:]), np.float32)
    wanted = np.float32(0.127) * 64 * 9
    found = answer(native(model), x)
    np.testing.assert_allclose(found[0, 0, 5, 5], wanted, rtol=1e-5)
    np.testing.assert_allclose(found[0, 1, 5, 5], -wanted, rtol=1e-5)
    np.testing.assert_allclose(found[0, 2, 5, 5], wanted / 3, rtol=1e-5)


# --- sessions --------------------------------------------------------------------------------------------------------


def pruned(zeros: float) -> bytes:
    net = Net()
    x = net.op("Relu", net.op("Conv", "x", net.weight(64, 3, 3, 3, zeros=zeros), net.normal(64), pads=[1] * 4))
    for _ in range(2):
        x = net.op("Relu", net.op("Conv", x, net.weight(64, 64, 3, 3, zeros=zeros), net.normal(64), pads=[1] * 4))
    return net.build(net.pooled(x, 64))


def test_dense_networks_stay_in_onnx_runtime() -> None:
    """Which is faster with them, and the report says so."""
    dense, sparse = (espalier.load(pruned(zeros)).report() for zeros in (0.0, 0.9))
    assert {layer.where for layer in dense.layers} == {"ONNX Runtime"}
    assert any("too few zeros" in layer.why for layer in dense.layers)
    assert {layer.where for layer in sparse.layers} == {"native"}


def test_an_executor_without_convolutions_leaves_them_to_onnx_runtime(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(pruned(0.9))
    (step,) = partition(passes.run(read(path)), path, images=False)
    assert isinstance(step, OrtSegment)
    assert step.whole
    assert {node.why for node in step.nodes} == {"the executor has no convolutions"}


def test_a_plan(tmp_path: Path) -> None:
    model = pruned(0.9)
    (tmp_path / "model.onnx").write_bytes(model)
    espalier.compile(tmp_path / "model.onnx", tmp_path / "model.espalier")
    session = espalier.load(tmp_path / "model.espalier")
    np.testing.assert_allclose(session.run(None, {"x": images(3)})[0], expected(model, images(3))[0], atol=1e-5)
    ragged = session.run_ragged(None, list(images(3)))
    np.testing.assert_allclose(np.stack(ragged[0]), expected(model, images(3))[0], atol=1e-5)


def test_wrong_images_are_refused() -> None:
    session = espalier.load(pruned(0.9))
    for x in (images(1)[0], images(1)[:, :2], images(1)[..., :-1], images(1).astype(np.float64)):
        with pytest.raises(espalier.errors.InputError):
            session.run(None, {"x": x})


def test_channels_that_come_last() -> None:
    """As TensorFlow's models have them: turned by ONNX Runtime, then native."""
    net = Net(channels=SIZE[1])
    x = net.op("Transpose", "x", perm=[0, 3, 1, 2])
    for inputs in (3, 64, 64):
        x = net.op("Relu", net.op("Conv", x, net.weight(64, inputs, 3, 3, zeros=0.95), pads=[1] * 4))
    model = net.build(net.pooled(x, 64), size=(SIZE[2], 3))
    session = espalier.load(model)
    foreign = [layer.op for layer in session.report().layers if layer.where != "native"]
    assert foreign == ["Transpose"]
    turned = np.ascontiguousarray(images(2).transpose(0, 2, 3, 1))
    np.testing.assert_allclose(session.run(None, {"x": turned})[0], expected(model, turned)[0], atol=1e-5)


def test_extents_that_are_not_known_run_in_onnx_runtime() -> None:
    net = Net()
    model = net.build(net.conv("x", 3, 4), size=("rows", "columns"))
    session = espalier.load(model)
    assert {layer.where for layer in session.report().layers} == {"ONNX Runtime"}
    for size in ((9, 9), (20, 11)):
        x = images(2, size=size)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(model, x)[0], atol=1e-5)


def test_convolutions_in_groups_say_why() -> None:
    net = Net()
    y = net.op("Conv", net.conv("x", 3, 8), net.weight(8, 1, 3, 3), group=8)
    (layer, *_) = (layer for layer in espalier.load(net.build(y)).report().layers if layer.op == "Conv")
    assert layer.where == "ONNX Runtime"
