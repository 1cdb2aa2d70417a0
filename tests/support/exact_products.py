"""ONNX models as ONNX Runtime computes them exactly on every processor."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

# Operators that multiply bytes, with the places of: the left zero point, the weight, the weight's zero point.
_PRODUCTS = {
    "ConvInteger": (2, 1, 3),
    "MatMulInteger": (2, 1, 3),
    "QLinearConv": (2, 3, 5),
    "QLinearMatMul": (2, 3, 5),
    "MatMulIntegerToFloat": (4, 1, 5),
    "DynamicQuantizeMatMul": (None, 1, 3),
    "QGemm": (2, 3, 5),
    "QAttention": (6, 1, 7),
}


def unsaturated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which weights of int8 that meet uint8 are uint8, 128 higher, and so are their zero points.

    The products are the same. ONNX Runtime's kernels for x86 without VNNI add pairs of products of uint8 and int8 in
    16 bits, and saturate; its option ``session.x64quantprecision`` helps only where it may fuse operators.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}

    def moved(array: np.ndarray, name: str) -> str:
        if name not in constants:
            constants[name] = (array.astype(np.int16) + 128).astype(np.uint8)
            made.graph.initializer.append(numpy_helper.from_array(constants[name], name))
        return name

    for node in made.graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        left, weight, zero = _PRODUCTS[node.op_type]
        given = [*node.input, *[""] * (zero + 1 - len(node.input))]
        array = constants.get(given[weight])
        signed = left is not None and given[left] in constants and constants[given[left]].dtype == np.int8
        if array is None or array.dtype != np.int8 or signed:
            continue
        zeros = constants[given[zero]] if given[zero] else np.zeros((), np.int8)
        node.input[:] = given
        node.input[weight] = moved(array, f"{given[weight]} as uint8")
        node.input[zero] = moved(zeros, f"{given[zero]} as uint8")
    return made
