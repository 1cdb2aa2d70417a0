"""Reading request bodies, within limits."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from espalier.serve.http.problems import HttpError

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """The whole body, decompressed, of at most ``limit`` bytes. Raises HttpError or ClientDisconnect."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError as error:
        raise HttpError(408, f"the body did not arrive within {timeout:g} s") from error
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return _decompressed(body, request.headers.get("content-encoding", "identity"), limit)


def _decompressed(body: bytes, coding: str, limit: int) -> bytes:
    coding = coding.strip().lower()
    if coding == "identity":
        return body
    if coding not in _WINDOWS:
        raise HttpError(415, f"Content-Encoding {coding[:32]!r} is not understood; send gzip, deflate or nothing")
    try:
        decoder = zlib.decompressobj(_WINDOWS[coding])
        data = decoder.decompress(body, limit + 1)
    except zlib.error as error:
        raise HttpError(400, f"the body is not {coding}: {error}") from error
    if len(data) > limit or decoder.unconsumed_tail:
        raise _too_large(limit)
    if not decoder.eof or decoder.unused_data:
        raise HttpError(400, f"the body is not one complete {coding} stream")
    return data


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body exceeds {limit} bytes, decompressed; send it in parts, or raise --body-mib")


__all__ = ["ClientDisconnect", "read_body"]
