"""The bytes between the query dispatch library and the nodes: frames over TCP, all numbers little-endian.

Every frame is ``length u32, kind u8, payload``, where the length counts kind and payload.

    HELLO   client to node   magic "ESPQDL1\\0", then the token, UTF-8, empty for none
    NAME    node to client   JSON: {"name", "tokens_per_s", "machine"}; the answer to HELLO and to PING
    PING    client to node   nothing
    QUERY   client to node   query id u64, leading u32, token ids i32 [tokens]
    ANSWER  node to client   query id u64, the task's numbers f32 []
    FAILED  node to client   query id u64, the reason, UTF-8

A query is one sequence, as long as it is: token ids alone, without padding. ``leading`` is how many of the tokens are
of type 0; the rest are of type 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from espalier.data import Feature
from espalier.errors import DataError

MAGIC = b"ESPQDL1\0"
HELLO, NAME, PING, QUERY, ANSWER, FAILED = range(1, 7)
MAX_FRAME = 1 << 20

_FRAME = struct.Struct("<IB")
_QUERY = struct.Struct("<IBQI")
_ANSWER = struct.Struct("<IBQ")
_ID = struct.Struct("<Q")
_HEAD = struct.Struct("<QI")


def frame(kind: int, payload: bytes = b"") -> bytes:
    """A frame of any kind."""
    return _FRAME.pack(1 + len(payload), kind) + payload


def query(number: int, feature: Feature) -> bytes:
    """A QUERY frame. Raises DataError for token types other than zeros followed by ones."""
    ids = np.ascontiguousarray(feature.ids, "<i4")
    leading = int(np.count_nonzero(feature.types == 0))
    if feature.types[:leading].any() or not (feature.types[leading:] == 1).all():
        raise DataError("token types must be zeros followed by ones; the wire format has no other")
    return _QUERY.pack(13 + ids.nbytes, QUERY, number, leading) + ids.tobytes()


def read_query(payload: memoryview) -> tuple[int, Feature]:
    """The query's id and its sequence. Raises DataError when the payload is none."""
    count, rest = divmod(len(payload) - _HEAD.size, 4)
    if count < 1 or rest:
        raise DataError(f"a query of {len(payload)} bytes; expected {_HEAD.size} and 4 for every token")
    number, leading = _HEAD.unpack_from(payload)
    if leading > count:
        raise DataError(f"{leading} leading tokens of {count}")
    types = np.zeros(count, np.int8)
    types[leading:] = 1
    return number, Feature(np.frombuffer(payload, "<i4", count, _HEAD.size).astype(np.int32), types, {})


def answer(number: int, values: np.ndarray) -> bytes:
    """An ANSWER frame."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    return _ANSWER.pack(9 + len(data), ANSWER, number) + data


def failed(number: int, reason: str) -> bytes:
    """A FAILED frame."""
    data = reason.encode()[:4096]
    return _ANSWER.pack(9 + len(data), FAILED, number) + data


def read_answer(payload: memoryview) -> tuple[int, memoryview]:
    """A query's id, and the rest. Raises DataError."""
    if len(payload) < _ID.size:
        raise DataError(f"an answer of {len(payload)} bytes; expected {_ID.size} or more")
    return _ID.unpack_from(payload)[0], payload[_ID.size :]


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """Every frame that is complete now: kind and payload. Raises DataError for one that is too long or empty."""
        view = memoryview(self._rest + data if self._rest else data)
        at = 0
        while len(view) - at >= _FRAME.size:
            length, kind = _FRAME.unpack_from(view, at)
            if not 1 <= length <= MAX_FRAME:
                raise DataError(f"a frame of {length} bytes; expected 1 to {MAX_FRAME}: is this the right port?")
            end = at + 4 + length
            if end > len(view):
                break
            yield kind, view[at + _FRAME.size : end]
            at = end
        self._rest = bytes(view[at:])
