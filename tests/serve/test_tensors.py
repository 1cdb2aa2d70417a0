"""Tensors on the wire: what goes in comes out, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from espalier.errors import InputError, InputShapeError, InputTypeError
from espalier.serve import tensors

NUMBERS = [name for name in tensors.DTYPES if name != "BYTES"]
SHAPES = hnp.array_shapes(max_dims=3, max_side=4)


@st.composite
def arrays(draw: Any) -> tuple[str, np.ndarray]:
    datatype = draw(st.sampled_from(NUMBERS))
    dtype = tensors.DTYPES[datatype]
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
    return datatype, draw(hnp.arrays(dtype, SHAPES, elements=elements))


@settings(max_examples=60, deadline=None)
@given(arrays())
def test_numbers_survive_both_ways(found: tuple[str, np.ndarray]) -> None:
    datatype, array = found
    back = tensors.from_bytes("x", datatype, array.shape, tensors.to_bytes(array))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype
    values = tensors.from_values("x", datatype, array.shape, tensors.to_values(array))
    np.testing.assert_array_equal(values, array)
    np.testing.assert_array_equal(tensors.from_values("x", datatype, array.shape, array.tolist()), array)
    assert tensors.datatype_of_dtype(array.dtype) == datatype


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_strings_survive_both_ways(texts: list[str]) -> None:
    array = np.array(texts, object)
    back = tensors.from_bytes("s", "BYTES", [len(texts)], tensors.to_bytes(array))
    assert back.tolist() == texts
    assert tensors.from_values("s", "BYTES", [len(texts)], tensors.to_values(array)).tolist() == texts


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([*tensors.DTYPES, "INT7", ""]),
    st.lists(st.integers(-1, 2**40), max_size=10),
    st.binary(max_size=40),
)
def test_any_bytes_give_a_tensor_or_an_input_error(datatype: str, shape: list[int], data: bytes) -> None:
    try:
        array = tensors.from_bytes("x", datatype, shape, data)
    except InputError:
        return
    assert list(array.shape) == shape


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([*tensors.DTYPES, "INT7"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=8,
    ),
)
def test_any_json_gives_a_tensor_or_an_input_error(datatype: str, shape: list[int], values: Any) -> None:
    try:
        array = tensors.from_values("x", datatype, shape, values)
    except InputError:
        return
    assert list(array.shape) == shape


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "error"),
    [
        ("INT8", [1], [300], InputTypeError),
        ("UINT8", [1], [-1], InputTypeError),
        ("INT64", [1], [1.5], InputTypeError),
        ("INT64", [1], [True], InputTypeError),
        ("INT64", [1], [2**70], InputTypeError),
        ("BOOL", [1], [1], InputTypeError),
        ("FP32", [1], ["1"], InputTypeError),
        ("FP32", [1], [None], InputTypeError),
        ("FP32", [1], [1e300], InputTypeError),
        ("FP32", [2], [1.0], InputShapeError),
        ("FP32", [2, 2], [[1.0, 2.0]], InputShapeError),
        ("FP32", [2], [[1.0], [2.0, 3.0]], InputError),
        ("FP32", [0], [], InputShapeError),
        ("FP32", [1] * 9, [1.0], InputShapeError),
        ("BYTES", [1], [1], InputTypeError),
    ],
)
def test_json_that_does_not_fit(datatype: str, shape: list[int], values: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="input 'x'"):
        tensors.from_values("x", datatype, shape, values)


def test_a_nan_is_refused() -> None:
    with pytest.raises(InputTypeError, match="NaN"):
        tensors.from_bytes("x", "FP32", [1], np.array([np.nan], np.float32).tobytes())


def test_bytes_at_an_odd_address_are_aligned() -> None:
    data = b"\0" + np.arange(3, dtype=np.int64).tobytes()
    array = tensors.from_bytes("x", "INT64", [3], memoryview(data)[1:])
    assert array.flags.aligned
    assert array.tolist() == [0, 1, 2]
