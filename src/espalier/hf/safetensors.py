"""Read safetensors files without copying: every tensor is a view of the memory-mapped file.

The format: eight bytes, little endian, hold the length N of the header; N bytes of JSON map each tensor's name to its
dtype, shape and byte range; the rest of the file is the data, which those ranges cover exactly. Files come from
strangers, so nothing in a header is believed before it is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import ModelFormatError, ModelNotFoundError

Array = NDArray[Any]

MAX_HEADER = 100_000_000
"""Bytes. The limit of the format's own reader."""

_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

FLOATS = ("F32", "F16", "BF16", "F64")
"""The element types that can be weights."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file: ``raw`` is its bytes, uint8, a view of the mapped file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Array

    def float32(self) -> Array:
        """The values. F32 is a view of the file wherever the file aligns it; the other float types are converted.

        Raises ModelFormatError when the element type is not a float.
        """
        if self.dtype not in FLOATS:
            raise ModelFormatError(
                f"{self.file}: tensor {self.name!r} must be of a float type ({', '.join(FLOATS)}), got {self.dtype}; "
                "save it in float32 or float16, or describe how it is quantised in config.json"
            )
        aligned = self.raw if self.raw.ctypes.data % _SIZES[self.dtype] == 0 else self.raw.copy()
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            wide = aligned.view("<u2").astype(np.uint32)
            wide <<= np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        stored = aligned.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[self.dtype])
        with np.errstate(over="ignore"):
            return stored.astype(np.float32, copy=False).reshape(self.shape)

    def bytes(self) -> Array:
        """The values as int8 or uint8, a view of the file. Raises ModelFormatError for another element type."""
        kinds = {"I8": np.int8, "U8": np.uint8}
        if self.dtype not in kinds:
            raise ModelFormatError(
                f"{self.file}: tensor {self.name!r} must be of {' or '.join(kinds)}, since config.json says that it is "
                f"quantised; got {self.dtype}"
            )
        return self.raw.view(kinds[self.dtype]).reshape(self.shape)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name.

    Raises ModelNotFoundError when there is no such file, ModelFormatError when it is truncated or corrupt.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file; expected a safetensors file with the model's weights")
    size = path.stat().st_size
    if size < 8:
        raise _broken(path, f"expected at least 8 bytes, got {size}")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    length = int(data[:8].view("<u8")[0])
    if length > min(MAX_HEADER, size - 8):
        raise _broken(path, f"its header claims {length} bytes; the file has {size} and headers end at {MAX_HEADER}")
    header = parse_json(bytes(data[8 : 8 + length]), f"{path}: header")
    header.pop("__metadata__", None)
    body = data[8 + length :]
    entries = [_entry(path, name, fields) for name, fields in header.items()]
    _check_cover(path, [(begin, end, name) for name, _, _, begin, end in entries], len(body))
    return {name: StoredTensor(path, name, dtype, shape, body[begin:end]) for name, dtype, shape, begin, end in entries}


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object with distinct keys. Raises ModelFormatError starting with ``what`` otherwise."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {name!r} stands there twice")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{what} is not valid JSON: {error}; the file is corrupt, fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _entry(path: Path, name: str, fields: object) -> tuple[str, str, tuple[int, ...], int, int]:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise _broken(path, f"tensor {name!r} needs dtype, shape and data_offsets, got {str(fields)[:80]}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _broken(path, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > 32:
        raise _broken(path, f"tensor {name!r} needs a shape of at most 32 extents >= 0, got {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} needs data_offsets of two numbers >= 0, got {str(offsets)[:80]}")
    begin, end = offsets
    wanted = math.prod(shape) * _SIZES[dtype]
    if end - begin != wanted:
        raise _broken(path, f"tensor {name!r} ({dtype} {shape}) needs {wanted} bytes, its offsets hold {end - begin}")
    return name, dtype, tuple(shape), begin, end


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _check_cover(path: Path, ranges: Iterable[tuple[int, int, str]], size: int) -> None:
    """The byte ranges must follow each other without a gap or an overlap, from the first byte to the last."""
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            fault = "overlaps the one before it" if begin < at else "leaves a gap before it"
            raise _broken(path, f"tensor {name!r} at bytes {begin} to {end} {fault}, which ends at {at}")
        at = end
    if at != size:
        raise _broken(path, f"its tensors need {at} bytes of data, the file has {size}")


def _broken(path: Path, what: str) -> ModelFormatError:
    return ModelFormatError(
        f"{path} is not a usable safetensors file: {what}. It is truncated or corrupt; fetch it again"
    )
