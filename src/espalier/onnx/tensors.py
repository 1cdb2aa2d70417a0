"""TensorProto to NumPy, with every size checked against the bytes that are there before anything is allocated."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from espalier.errors import ModelFormatError, ModelNotFoundError

# TensorProto.DataType -> NumPy dtype name, for the types NumPy has itself.
PLAIN = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128",
}  # fmt: skip
STRING = 8


def dtype_of(element: int) -> np.dtype[Any] | None:
    """NumPy dtype of an ONNX element type (``ml_dtypes`` for bfloat16, float8, int4 and the like); None if unknown."""
    if element in PLAIN:
        return np.dtype(PLAIN[element])
    import onnx

    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))
    except (KeyError, ValueError, TypeError):
        return None


def bits_of(element: int) -> int:
    """Bits of one stored element: 4 or 2 for packed types."""
    dtype = dtype_of(element)
    if dtype is None:
        return 0
    if dtype.name in ("int4", "uint4", "float4_e2m1fn"):
        return 4
    if dtype.name in ("int2", "uint2"):
        return 2
    return dtype.itemsize * 8


def count_of(name: str, dims: Sequence[int]) -> int:
    """Number of elements. Raises ModelFormatError on a negative extent or an absurd product."""
    if any(d < 0 for d in dims) or len(dims) > 64:
        raise ModelFormatError(f"initializer {name!r} has the impossible shape {list(dims)[:8]}")
    count = math.prod(dims)
    if count >= 1 << 48:
        raise ModelFormatError(f"initializer {name!r} has the impossible shape {list(dims)}: {count} elements")
    return count


def from_bytes(name: str, element: int, dims: Sequence[int], data: Any, offset: int, length: int) -> np.ndarray:
    """A read-only view of raw bytes in ``data``. Raises ModelFormatError if the length does not fit the shape."""
    count = count_of(name, dims)
    dtype = dtype_of(element)
    if dtype is None or element == STRING:
        raise ModelFormatError(f"initializer {name!r} has raw data of the unknown element type {element}")
    bits = bits_of(element)
    expected = -(-count * bits // 8)
    if length != expected:
        raise ModelFormatError(
            f"initializer {name!r} is {dtype.name}{list(dims)}, which takes {expected} bytes, but {length} are stored; "
            "the file is truncated or corrupt"
        )
    if bits < 8:
        packed = np.frombuffer(data, np.uint8, expected, offset)
        return _unpack(packed, bits, count, dtype).reshape(dims)
    if count == 0:
        return np.zeros(dims, dtype)
    array = np.frombuffer(data, dtype, count, offset).reshape(dims)
    array.flags.writeable = False
    return array


def _unpack(packed: np.ndarray, bits: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    per = 8 // bits
    mask = (1 << bits) - 1
    codes = np.stack([(packed >> (bits * i)) & mask for i in range(per)], axis=-1).reshape(-1)[:count]
    if dtype.name.startswith("int"):
        half = 1 << (bits - 1)
        return ((codes.astype(np.int8) ^ half) - half).astype(dtype)
    if dtype.name.startswith("uint"):
        return codes.astype(dtype)
    return codes.astype(np.uint8).view(dtype)


def from_proto(tensor: Any, folders: Sequence[Path], maps: dict[Path, Any]) -> np.ndarray:
    """The array of a TensorProto, external data included (memory-mapped, one map per file in ``maps``).

    Raises ModelFormatError when dims, type and data disagree, ModelNotFoundError when a data file is missing.
    """
    import onnx

    name = tensor.name or "(constant)"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, folders, maps)
    if tensor.HasField("raw_data"):
        return from_bytes(name, tensor.data_type, tensor.dims, tensor.raw_data, 0, len(tensor.raw_data))
    count = count_of(name, tensor.dims)
    if dtype_of(tensor.data_type) is None:
        raise ModelFormatError(f"initializer {name!r} has the unknown element type {tensor.data_type}")
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    stored = len(getattr(tensor, field))
    per = 8 // bits_of(tensor.data_type) if bits_of(tensor.data_type) < 8 else 1
    words = 2 if tensor.data_type in (14, 15) else 1
    if stored * per // words < count or (stored and stored > -(-count * words // per)):
        raise ModelFormatError(
            f"initializer {name!r} has shape {list(tensor.dims)}, {count} elements, but {stored} values are stored "
            f"in its {field}; the file is truncated or corrupt"
        )
    try:
        array = np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"initializer {name!r} cannot be decoded: {error}") from error
    array.flags.writeable = False
    return array


def _external(tensor: Any, folders: Sequence[Path], maps: dict[Path, Any]) -> np.ndarray:
    name = tensor.name
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = _inside(name, location, folders)
    data = maps.get(path)
    if data is None:
        if not path.is_file():
            raise ModelNotFoundError(
                f"initializer {name!r} is stored in {location!r}, but there is no such file beside the model; "
                "copy the data file next to the .onnx file"
            )
        with path.open("rb") as file:
            size = path.stat().st_size
            data = maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    size = len(data)
    try:
        offset = int(entries.get("offset", 0) or 0)
        needed = -(-count_of(name, tensor.dims) * bits_of(tensor.data_type) // 8)
        length = int(entries["length"]) if entries.get("length") else needed
    except ValueError as error:
        raise ModelFormatError(f"initializer {name!r} has a malformed external offset or length: {entries}") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelFormatError(
            f"initializer {name!r} needs bytes {offset} to {offset + length} of {location!r}, which has {size}; "
            "the data file is truncated or belongs to another model"
        )
    return from_bytes(name, tensor.data_type, tensor.dims, data, offset, length)


def _inside(name: str, location: str, folders: Sequence[Path]) -> Path:
    """The data file's path, refused when it is absolute or leads out of the model's folder.

    ``folders`` are the model's folder and the folder of the file it is a link to, which differ in download caches
    that keep every file as a link into one store.
    """
    parts = [*PurePosixPath(location).parts, *PureWindowsPath(location).parts]
    bad = not location or "\0" in location or ".." in parts or not folders
    if bad or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        raise ModelFormatError(
            f"initializer {name!r} refers to the external file {location!r}; expected a relative path inside the "
            "model's folder"
        )
    path = (folders[0] / location).resolve()
    if not any(path.is_relative_to(folder.resolve()) for folder in folders):
        raise ModelFormatError(
            f"initializer {name!r} refers to the external file {location!r}, "
            "a link that leads outside the model's folder"
        )
    return path
