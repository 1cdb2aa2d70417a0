"""The arithmetic of quantisation against ONNX Runtime, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from espalier.ir.quantization import dequantize, quantize, token_parameters

RNG = np.random.default_rng(5)
ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.5, -0.5, 1.5, 2.5, 127.5, -128.5]


def run(op: str, inputs: dict[str, np.ndarray], outputs: dict[str, type]) -> list[np.ndarray]:
    """One ONNX node in ONNX Runtime."""

    def info(name: str, dtype: object, rank: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None] * rank)

    ends = [info(name, array.dtype, array.ndim) for name, array in inputs.items()]
    rank = next(iter(inputs.values())).ndim
    results = [info(name, dtype, rank if at == 0 else 0) for at, (name, dtype) in enumerate(outputs.items())]
    graph = helper.make_graph([helper.make_node(op, list(inputs), list(outputs))], op, ends, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(113), np.uint8(255), np.int8(0), np.int8(-128), np.int8(127)])
@pytest.mark.parametrize("scale", [0.037, 1.0, 1e-3])
def test_quantize_and_dequantize(scale: float, zero: np.generic) -> None:
    step = np.float32(scale)
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * step
    x = np.concatenate([ODD, ties, np.nextafter(ties, 0), RNG.normal(0, 100 * scale, 5000)]).astype(np.float32)
    feeds = {"x": x, "scale": np.asarray(step), "zero": np.asarray(zero)}
    (wanted,) = run("QuantizeLinear", feeds, {"y": zero.dtype.type})
    found = quantize(x, step, np.asarray(zero))
    np.testing.assert_array_equal(found, wanted)
    (back,) = run("DequantizeLinear", {**feeds, "x": found}, {"y": np.float32})
    np.testing.assert_array_equal(dequantize(found, step, np.asarray(zero)), back)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0, 100.0])
def test_token_parameters(shift: float) -> None:
    x = (RNG.normal(0, 1, (200, 7)) * RNG.lognormal(0, 3, (200, 1)) + shift).astype(np.float32)
    x[0], x[1] = 0, -x[1, 0]
    scale, zero = token_parameters(x)
    for row in range(len(x)):
        q, s, z = run("DynamicQuantizeLinear", {"x": x[row]}, {"y": np.uint8, "s": np.float32, "z": np.uint8})
        assert (scale[row, 0], zero[row, 0]) == (s, z)
        np.testing.assert_array_equal(quantize(x[row], s, z), q)


def test_token_parameters_of_odd_tokens() -> None:
    x = np.array([[1, np.nan], [np.inf, 0], [3e38, -3e38], [1e-45, 0], [0, 0], [255, 0]], np.float32)
    scale, zero = token_parameters(x)
    np.testing.assert_array_equal(scale[:, 0], np.array([np.nan, np.nan, np.nan, 1, 1, 1], np.float32))
    assert not zero.any()
    assert not quantize(x[:5], scale[:5], zero[:5]).any()
