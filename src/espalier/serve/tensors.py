"""Tensors on the wire of the Open Inference Protocol: names of types, bytes, and JSON values.

Binary tensors are little-endian and row-major; BYTES elements each follow their length in four bytes.
Specification: https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier._session.describe import TensorInfo
from espalier.errors import InputShapeError, InputTypeError

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{'U' if kind == 'u' else ''}INT{8 * size}": np.dtype(f"<{kind}{size}")
        for kind in "iu"
        for size in (1, 2, 4, 8)
    },
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_BY_ELEMENT = {
    "bool": "BOOL", "float16": "FP16", "float": "FP32", "double": "FP64", "string": "BYTES",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip
_MAX_RANK = 8
_LENGTH = struct.Struct("<I")


def datatype_of(info: TensorInfo) -> str:
    """The protocol's name for a session's type; the session's own name where there is none."""
    element = info.type.removeprefix("tensor(").removesuffix(")")
    return _BY_ELEMENT.get(element, info.type)


@functools.lru_cache(maxsize=64)
def datatype_of_dtype(dtype: np.dtype[Any]) -> str:
    """The protocol's name for the type of an array. Raises InputTypeError when it has none."""
    plain = {"float32": "float", "float64": "double"}
    element = "string" if dtype.kind in "OUS" else plain.get(dtype.name, dtype.name)
    if element not in _BY_ELEMENT:
        raise InputTypeError(f"an output of type {dtype.name} has no form in the protocol")
    return _BY_ELEMENT[element]


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> np.ndarray:
    """An input tensor from its bytes, which are not copied where their alignment allows.

    Raises InputTypeError for an unknown type, InputShapeError when shape and size do not fit.
    """
    dtype, count = _expect(name, datatype, shape)
    if datatype == "BYTES":
        return _strings_from(name, data, count).reshape(shape)
    if len(data) != count * dtype.itemsize:
        raise InputShapeError(
            f"input {name!r}: {datatype} of shape {list(shape)} takes {count * dtype.itemsize} bytes; got {len(data)}"
        )
    array: np.ndarray = np.ndarray(shape, dtype, data)
    if not array.flags.aligned:
        array = array.copy()
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise InputTypeError(f"input {name!r}: a BOOL is a byte of 0 or 1")
    return _without_nan(name, array)


def from_values(name: str, datatype: str, shape: Sequence[int], values: Any) -> np.ndarray:
    """An input tensor from JSON values, flat or nested in row-major order.

    Raises InputTypeError for values of another type or out of range, InputShapeError when shape and values do not fit.
    """
    dtype, count = _expect(name, datatype, shape)
    if not isinstance(values, list):
        raise InputTypeError(f"input {name!r}: data must be a list of values; got {type(values).__name__}")
    if datatype == "BYTES":
        array = _strings_of(name, values)
    else:
        try:
            found = np.array(values)
            if datatype == "UINT64" and found.dtype.kind == "f":
                found = _unsigned(np.array(values, object))
        except ValueError as error:
            raise InputShapeError(f"input {name!r}: data is nested unevenly; expected shape {list(shape)}") from error
        array = _converted(name, datatype, dtype, found)
    if array.size != count or array.ndim not in (1, len(shape)) or (array.ndim > 1 and array.shape != tuple(shape)):
        raise InputShapeError(f"input {name!r}: data has shape {list(array.shape)}; expected {list(shape)}, or flat")
    return _without_nan(name, array.reshape(shape))


def to_bytes(array: np.ndarray) -> bytes:
    """An output tensor's bytes."""
    if array.dtype.kind not in "OUS":
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    encoded = [_encoded(value) for value in array.reshape(-1)]
    return b"".join(part for value in encoded for part in (_LENGTH.pack(len(value)), value))


def to_values(array: np.ndarray) -> list[Any]:
    """An output tensor's values for JSON, flat. What is not a finite number becomes null: JSON has no word for it."""
    flat = array.reshape(-1)
    if array.dtype.kind in "OUS":
        return [_encoded(value).decode("utf-8", "replace") for value in flat]
    return flat.tolist()


def _expect(name: str, datatype: str, shape: Sequence[int]) -> tuple[np.dtype[Any], int]:
    """The dtype and the number of elements."""
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InputTypeError(f"input {name!r}: unknown datatype {datatype!r}; known: {', '.join(DTYPES)}")
    if len(shape) > _MAX_RANK:
        raise InputShapeError(f"input {name!r}: {len(shape)} dimensions; at most {_MAX_RANK} are served")
    if shape and min(shape) < 1:
        raise InputShapeError(f"input {name!r}: shape {list(shape)} holds nothing; every extent must be at least 1")
    return dtype, math.prod(shape)


def _converted(name: str, datatype: str, dtype: np.dtype[Any], found: np.ndarray) -> np.ndarray:
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if found.dtype.kind not in allowed:
        raise InputTypeError(f"input {name!r}: data does not hold {datatype} values; got {found.dtype.name}")
    with np.errstate(over="ignore"):
        array = found.astype(dtype)
    if dtype.kind in "iu" and not (array == found).all():
        raise InputTypeError(f"input {name!r}: data holds a number that does not fit {datatype}")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InputTypeError(f"input {name!r}: data holds a number too large for {datatype}")
    return array


def _unsigned(found: np.ndarray) -> np.ndarray:
    """NumPy makes floats of whole numbers on both sides of 2^63; this keeps them."""
    whole = all(type(value) is int and 0 <= value < 1 << 64 for value in found.flat)
    return found.astype(np.uint64) if whole else found


def _without_nan(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise InputTypeError(
            f"input {name!r} holds a NaN; give numbers, and missing values the way the model knows them"
        )
    return array


def _strings_from(name: str, data: bytes | memoryview, count: int) -> np.ndarray:
    found: list[str] = []
    view, at = memoryview(data), 0
    while at < len(view):
        end = at + 4
        end += _LENGTH.unpack_from(view, at)[0] if end <= len(view) else 0
        if end > len(view) or end < at + 4:
            raise InputShapeError(f"input {name!r}: its last string is cut off at byte {at} of {len(view)}")
        found.append(_decoded(name, bytes(view[at + 4 : end])))
        at = end
    if len(found) != count:
        raise InputShapeError(f"input {name!r}: its shape takes {count} strings; got {len(found)}")
    return _object_array(found)


def _strings_of(name: str, values: list[Any]) -> np.ndarray:
    flat: list[Any] = values
    while flat and all(isinstance(value, list) for value in flat):
        flat = [inner for value in flat for inner in value]
    if not all(isinstance(value, str) for value in flat):
        raise InputTypeError(f"input {name!r}: BYTES in JSON are strings")
    return _object_array(flat)


def _object_array(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def strings(name: str, values: Sequence[bytes], shape: Sequence[int]) -> np.ndarray:
    """A BYTES tensor of these elements. Raises InputShapeError, and InputTypeError for what is not UTF-8."""
    _, count = _expect(name, "BYTES", shape)
    if len(values) != count:
        raise InputShapeError(f"input {name!r}: its shape takes {count} strings; got {len(values)}")
    return _object_array([_decoded(name, value) for value in values]).reshape(shape)


def _decoded(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputTypeError(f"input {name!r}: a string is not UTF-8: {error}") from error


def _encoded(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
