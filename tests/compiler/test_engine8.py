"""The engine's 8 bit operations through its bindings, against plain NumPy and ONNX Runtime, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from espalier import _native
from espalier.errors import EngineError
from espalier.ir.quantization import dequantize, quantize, token_parameters

ISAS = [isa for isa in _native.built_isas() if _native.select_isa(_native.arch_flags(), isa) == isa]
RANDOM = np.random.default_rng(8)
ROWS, COLUMNS, TOKENS = 37, 61, 70


def run(isa: str, x: np.ndarray, width: int, build: Callable[[_native.Program, int], int]) -> np.ndarray:
    """``[tokens, width]``: what ``build`` makes of ``x`` ``[tokens, F]``."""
    program = _native.Program(isa, 2)
    value = build(program, program.add_load("x", x.shape[1], 0, 0))
    program.add_store("y", value, 0, width)
    program.finish()
    y = np.empty((len(x), width), np.float32)
    lengths, zero = np.array([len(x)], np.int32), np.zeros(1, np.int32)
    program.run(lengths, zero, zero, lengths, [], [np.ascontiguousarray(x)], [], None, None, [y])
    return y


def layer(largest: int = 127) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights with empty blocks and an empty row, scales, bias."""
    w = RANDOM.integers(-largest, largest + 1, (ROWS, COLUMNS)).astype(np.int16)
    w[RANDOM.random((ROWS, COLUMNS // 4 + 1)).repeat(4, 1)[:, :COLUMNS] < 0.5] = 0
    w[3] = 0
    return w, RANDOM.random(ROWS).astype(np.float32), RANDOM.standard_normal(ROWS).astype(np.float32)


def expected(x: np.ndarray, w: np.ndarray, scales: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    total = (quantize(x, scale, zero).astype(np.int64) - zero) @ w.T.astype(np.int64)
    product: np.ndarray = total.astype(np.float32) * scale * scales
    return product


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["dense8", "1x4x8"])
@pytest.mark.parametrize("static", [(), (0.03, 131)])
def test_linear8(isa: str, kind: str, static: tuple[float, int]) -> None:
    x = (RANDOM.standard_normal((TOKENS, COLUMNS)) * 3).astype(np.float32)
    w, scales, bias = layer(255)
    scale, zero = (np.float32(static[0]), np.uint8(static[1])) if static else token_parameters(x)
    weight = _native.Weight8(_native.Matrix8(w, scales), kind, isa)

    def build(program: _native.Program, value: int) -> int:
        return program.add_linear8("l", program.add_quantize("q", value, *static), weight, bias)

    np.testing.assert_array_equal(run(isa, x, ROWS, build), expected(x, w, scales, scale, zero) + bias)


@pytest.mark.parametrize("isa", ISAS)
def test_two_layers_without_floats_in_between(isa: str) -> None:
    x = RANDOM.standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    (w, scales, bias), back = layer(), RANDOM.integers(-127, 128, (5, ROWS)).astype(np.int16)
    s, z = np.float32(40.0), np.uint8(9)

    def build(program: _native.Program, value: int) -> int:
        first = _native.Weight8(_native.Matrix8(w, scales), "1x4x8", isa)
        second = _native.Weight8(_native.Matrix8(back, scales[:5]), "dense8", isa)
        q = program.add_quantize("q", value)
        h = program.add_linear8("l", q, first, bias, act="relu", out_scale=float(s), out_zero=float(z))
        return program.add_linear8("m", h, second, None)

    hidden = np.maximum(expected(x, w, scales, *token_parameters(x)) + bias, 0)
    np.testing.assert_array_equal(run(isa, x, 5, build), expected(hidden, back, scales[:5], s, z))


@pytest.mark.parametrize("isa", ISAS)
def test_quantise_is_what_onnx_runtime_does(isa: str) -> None:
    ties = np.arange(-600, 600, dtype=np.float32) * np.float32(0.5)
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 3e38, -3e38, 1e-45], np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9)), special])
    x = x.astype(np.float32).reshape(-1, 8)
    for scale, zero in (
        (np.float32(1), np.uint8(128)),
        (np.float32(0.1), np.uint8(3)),
        (np.float32(1 / 3), np.uint8(0)),
    ):
        y = run(
            isa, x, 8, lambda p, v, s=scale, z=zero: p.add_dequantize("d", p.add_quantize("q", v, float(s), float(z)))
        )  # type: ignore[misc]
        nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
        constants = [onnx.numpy_helper.from_array(np.array(v), n) for v, n in ((scale, "s"), (zero, "z"))]
        ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape)] for n in "xy"]
        model = helper.make_model(helper.make_graph(nodes, "g", *ends, constants), ir_version=8)
        model.opset_import[0].version = 13
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(y, session.run(None, {"x": x})[0])
        np.testing.assert_array_equal(y, dequantize(quantize(x, scale, zero), scale, zero))


def test_what_a_weight_says_about_itself() -> None:
    w, scales, _ = layer()
    matrix = _native.Matrix8(w, scales)
    assert (matrix.rows, matrix.columns, matrix.nonzeros) == (ROWS, COLUMNS, np.count_nonzero(w))
    padded = np.pad(w, ((0, 0), (0, -COLUMNS % 4))).reshape(ROWS, -1, 4)
    assert matrix.blocks1x4 == np.count_nonzero(padded.any(-1))
    for isa in ISAS:
        ranked = matrix.candidates(isa)
        assert {name for name, _ in ranked} == {"dense8", "1x4x8"}
        for name, _ in ranked:
            weight = _native.Weight8(matrix, name, isa)
            assert weight.nonzeros == matrix.nonzeros
            assert weight.bytes > 0
            assert weight.time(isa) > 0


def test_bad_input_is_refused() -> None:
    good = np.ones((4, 8), np.int16)
    with pytest.raises(EngineError, match="4 rows needs as many scales, got 3"):
        _native.Matrix8(good, np.ones(3, np.float32))
    with pytest.raises(EngineError, match=r"is 300; it must be within \[-255, 255\]"):
        _native.Matrix8(good * 300, np.ones(4, np.float32))
    with pytest.raises(EngineError, match="scale of row 1"):
        _native.Matrix8(good, np.array([1, np.nan, 1, 1], np.float32))
    with pytest.raises(EngineError, match="does not fit 32 bits"):
        _native.Matrix8(np.full((1, 40000), 255, np.int16), np.ones(1, np.float32))
    with pytest.raises(EngineError, match="at least one row"):
        _native.Matrix8(np.ones((4, 0), np.int16), np.ones(4, np.float32))
    matrix = _native.Matrix8(good, np.ones(4, np.float32))
    with pytest.raises(EngineError, match="known: dense8, 1x4x8"):
        _native.Weight8(matrix, "dense", "scalar")
    program = _native.Program("scalar", 1)
    x = program.add_load("x", 8, 0, 0)
    with pytest.raises(EngineError, match="both a scale and a zero point"):
        program.add_quantize("q", x, 0.5)
    with pytest.raises(EngineError, match="reads one of floats"):
        program.add_linear8("l", x, _native.Weight8(matrix, "dense8", "scalar"), None)
    with pytest.raises(EngineError, match="no processor flag"):
        _native.select_isa(["mmx"])
