"""Just enough of the protobuf wire format to find large tensors in a model file without copying them."""

from __future__ import annotations

from collections.abc import Iterator

from espalier.errors import ModelFormatError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Buffer = memoryview


def varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """The number at ``at`` and the offset after it. Raises ModelFormatError if it runs past ``end``."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ModelFormatError(f"not an ONNX model: a number of the protobuf encoding is cut off at byte {at}")


def fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield ``(field, wire type, begin, value or payload begin, payload end)`` for each field of a message.

    For a varint the fourth item is the number; for the others it is where the payload begins.
    Raises ModelFormatError when the bytes are not a message.
    """
    at = start
    while at < end:
        begin = at
        key, at = varint(data, at, end)
        field, kind = key >> 3, key & 7
        if field == 0:
            raise ModelFormatError(f"not an ONNX model: field number 0 at byte {begin} of the protobuf encoding")
        if kind == VARINT:
            value, at = varint(data, at, end)
            yield field, kind, begin, value, at
            continue
        if kind == BYTES:
            length, at = varint(data, at, end)
        elif kind == FIXED64:
            length = 8
        elif kind == FIXED32:
            length = 4
        else:
            raise ModelFormatError(f"not an ONNX model: wire type {kind} at byte {begin} is unknown")
        if length > end - at:
            raise ModelFormatError(
                f"the model is truncated or corrupt: a field at byte {begin} claims {length} bytes, "
                f"but only {end - at} are left"
            )
        yield field, kind, begin, at, at + length
        at += length


def tag(field: int, payload: int) -> bytes:
    """The key and length that come before a BYTES payload of that many bytes."""
    return _number(field << 3 | BYTES) + _number(payload)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> int:
    """A varint as the int64 it encodes."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
