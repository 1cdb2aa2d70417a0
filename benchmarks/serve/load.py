"""Load on a server from this machine: prebuilt requests over raw connections, so that the client costs little."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from espalier.serve.rpc.messages import SERVICE, message

OUTPUTS_PARAMETERS = {"binary_data": True}
INFER_PATH = f"/{SERVICE}/ModelInfer"
REFUSED = (429, 503)
TIMEOUT_S = 100.0
Send = Callable[[int], Awaitable[int]]
"""Sends sample ``i`` and returns the HTTP status, or its counterpart."""


class Answer(NamedTuple):
    """When it came, by ``time.perf_counter``, how many seconds it took, and its status; 0 for none."""

    at: float
    seconds: float
    status: int


@dataclass
class Tally:
    """What became of requests."""

    answers: list[Answer] = field(default_factory=list)

    async def run(self, send: Send, number: int) -> None:
        """Send one and count what comes."""
        start = time.perf_counter()
        try:
            status = await send(number)
        except (OSError, EOFError):
            status = 0
        now = time.perf_counter()
        self.answers.append(Answer(now, now - start, status))

    def since(self, start: float) -> Tally:
        """Those answered from ``start`` on."""
        return Tally([answer for answer in self.answers if answer.at >= start])

    def seconds(self, *statuses: int) -> np.ndarray:
        """What answers with one of these statuses took; all of them for none. float64 ``[answers]``."""
        return np.array([one.seconds for one in self.answers if not statuses or one.status in statuses])

    def codes(self) -> dict[int, int]:
        """How many answers had each status."""
        return dict(sorted(Counter(answer.status for answer in self.answers).items()))

    def summary(self, seconds: float) -> dict[str, Any]:
        """Answers per second, and percentiles in milliseconds."""
        done, refused = self.seconds(200), self.seconds(*REFUSED)
        failed = len(self.answers) - len(done) - len(refused)
        found: dict[str, Any] = {"per_s": len(done) / seconds, "done": len(done), "failed": failed}
        for name, times in (("done", done), ("refused", refused)):
            if len(times):
                values = np.percentile(times * 1e3, (50, 90, 99)).round(3).tolist()
                found[f"{name}_ms"] = dict(zip(("p50", "p90", "p99"), values, strict=True))
        found["refused"] = len(refused)
        return found


class _Connection(asyncio.Protocol):
    """One keep-alive connection, with one request under way at a time. Streams would cost more than the server does."""

    def __init__(self) -> None:
        self.lost = False
        self._transport: Any = None
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or EOFError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, ended, body = self._received.partition(b"\r\n\r\n")
        if not ended or self._answer is None:
            return
        head = head.lower()
        at = head.index(b"content-length:") + 15
        if len(body) >= int(head[at:].split(b"\r\n", 1)[0]) and not self._answer.done():
            self._answer.set_result((head, body))

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """The head, in lower case, and the body of the answer. Raises OSError, EOFError."""
        loop = asyncio.get_running_loop()
        self._received, self._answer = b"", loop.create_future()
        late = loop.call_later(TIMEOUT_S, self.close)
        try:
            self._transport.write(request)
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            late.cancel()

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._transport.abort()


class Http:
    """Binary requests over keep-alive connections, as many as are ever under way at once.

    ``hosts``: addresses of one service. The first is asked; where it hangs up or does not answer, the next.
    """

    def __init__(
        self,
        port: int,
        model: str,
        samples: Sequence[dict[str, np.ndarray]],
        output: str,
        hosts: Sequence[str] = ("127.0.0.1",),
    ) -> None:
        self._port = port
        self._requests = [self._encode(model, feeds, output) for feeds in samples]
        self._free: dict[str, list[_Connection]] = {host: [] for host in hosts}

    @staticmethod
    def parts(feeds: dict[str, np.ndarray], output: str) -> tuple[bytes, bytes]:
        """The JSON head and the tensors of a request's body."""
        inputs = [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": "INT64",
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in feeds.items()
        ]
        head = json.dumps({"inputs": inputs, "outputs": [{"name": output, "parameters": OUTPUTS_PARAMETERS}]}).encode()
        return head, b"".join(array.tobytes() for array in feeds.values())

    @classmethod
    def _encode(cls, model: str, feeds: dict[str, np.ndarray], output: str) -> bytes:
        head, tensors = cls.parts(feeds, output)
        lines = [
            f"POST /v2/models/{model}/infer HTTP/1.1",
            "host: localhost",
            f"inference-header-content-length: {len(head)}",
            f"content-length: {len(head) + len(tensors)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + head + tensors

    async def send(self, number: int) -> int:
        """Send a sample and read the whole answer. Raises OSError, EOFError."""
        return (await self.ask(number))[0]

    async def ask(self, number: int) -> tuple[int, bytes]:
        """The status and body of the answer to a sample. Raises the last host's OSError or EOFError."""
        *first, last = self._free
        for host in first:
            with contextlib.suppress(OSError, EOFError):
                return await self._ask(host, number)
        return await self._ask(last, number)

    async def _ask(self, host: str, number: int) -> tuple[int, bytes]:
        free = self._free[host]
        while free and free[-1].lost:  # it hung up meanwhile, which says nothing about this request
            free.pop()
        if free:
            connection = free.pop()
        else:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, self._port)
        head, body = await connection.ask(self._requests[number % len(self._requests)])
        if b"\nconnection: close" in head:  # HAProxy says so when it is replaced by one with other machines
            connection.close()
        else:
            free.append(connection)
        return int(head[9:12]), body

    async def close(self) -> None:
        """Close every connection."""
        for free in self._free.values():
            for connection in free:
                connection.close()


class _Stream(asyncio.Protocol):
    """One HTTP/2 connection with any number of gRPC calls under way (RFC 9113; gRPC's "PROTOCOL-HTTP2").

    No more of either than a load on one method needs: the same header block for every call, never indexed, and answers
    of which only the frames are read. A call that fails has no message, so that its status need not be decoded.
    """

    _DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
    _END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
    _WIDEST = (1 << 31) - 1

    def __init__(self, path: str) -> None:
        words = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
        words |= {"te": "trailers", "content-type": "application/grpc"}
        self._head = b"".join(_literal(name, value) for name, value in words.items())
        self._transport: Any = None
        self._received = bytearray()
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._answered: set[int] = set()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._window = 65535
        self._next = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        widest = self._WIDEST.to_bytes(4)
        settings = self._frame(self._SETTINGS, 0, 0, (4).to_bytes(2) + widest)  # SETTINGS_INITIAL_WINDOW_SIZE
        window = self._frame(self._WINDOW, 0, 0, (self._WIDEST - 65535).to_bytes(4))
        self._transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + window)

    def connection_lost(self, exc: Exception | None) -> None:
        for call in self._calls.values():
            if not call.done():
                call.set_exception(exc or EOFError("the server hung up"))
        self._calls.clear()

    def data_received(self, data: bytes) -> None:
        buffer, at = self._received, 0
        buffer += data
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3])
            if len(buffer) - at < 9 + size:
                break
            kind, flags, stream = buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 9])
            self._take(kind, flags, stream, bytes(buffer[at + 9 : at + 9 + size]))
            at += 9 + size
        del buffer[:at]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == self._DATA and payload:
            self._answered.add(stream)
        elif kind == self._WINDOW and stream == 0:
            self._window += int.from_bytes(payload)
            self._send_waiting()
        elif kind in (self._SETTINGS, self._PING) and not flags & self._ACK:
            self._transport.write(self._frame(kind, self._ACK, 0, payload if kind == self._PING else b""))
        elif kind == self._GOAWAY:
            self._transport.close()
        ended = kind == self._RESET or (kind in (self._DATA, self._HEADERS) and flags & self._END_STREAM)
        call = self._calls.pop(stream, None) if ended else None
        if call is not None and not call.done():
            call.set_result(stream in self._answered and kind != self._RESET)
            self._answered.discard(stream)

    async def call(self, request: bytes) -> bool:
        """Whether a message came back. Raises OSError, EOFError."""
        if self._transport.is_closing():
            raise EOFError("the server hung up")
        stream, self._next = self._next, self._next + 2
        answer = self._calls[stream] = asyncio.get_running_loop().create_future()
        self._waiting.append((stream, request))
        self._send_waiting()
        return await answer

    def _send_waiting(self) -> None:
        """As far as the connection's window goes; a request has less than a stream's window and a frame's limit."""
        out = []
        while self._waiting and len(self._waiting[0][1]) <= self._window:
            stream, message = self._waiting.popleft()
            self._window -= len(message)
            out.append(self._frame(self._HEADERS, self._END_HEADERS, stream, self._head))
            out.append(self._frame(self._DATA, self._END_STREAM, stream, message))
        if out:
            self._transport.write(b"".join(out))

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()


def _literal(name: str, value: str) -> bytes:
    """A header field that is not to be indexed, with a new name (RFC 7541, 6.2.2), each of less than 127 bytes."""
    return b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in (name, value))


class Grpc:
    """ModelInfer with raw contents over one connection. What fails counts as 500, for whatever reason."""

    def __init__(self, port: int, model: str, samples: Sequence[dict[str, np.ndarray]], output: str) -> None:
        self._port = port
        self._connection: asyncio.Future[tuple[Any, _Stream]] | None = None
        self._requests = [self.encode(model, feeds, output) for feeds in samples]

    @staticmethod
    def encode(model: str, feeds: dict[str, np.ndarray], output: str) -> bytes:
        """A request as gRPC has it on the wire: not compressed, its length, the message."""
        request = message("ModelInferRequest")(model_name=model)
        request.outputs.add(name=output)
        for name, array in feeds.items():
            request.inputs.add(name=name, datatype="INT64", shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        data: bytes = request.SerializeToString()
        return b"\0" + len(data).to_bytes(4) + data

    async def send(self, number: int) -> int:
        """Send a sample and wait for the answer. Raises OSError, EOFError."""
        if self._connection is None:
            loop = asyncio.get_running_loop()
            opening = loop.create_connection(lambda: _Stream(INFER_PATH), "127.0.0.1", self._port)
            self._connection = asyncio.ensure_future(opening)
        _, stream = await self._connection if not self._connection.done() else self._connection.result()
        return 200 if await stream.call(self._requests[number % len(self._requests)]) else 500

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            (await self._connection)[1].close()


async def run_all(send: Send, count: int, concurrency: int) -> tuple[Tally, float]:
    """So many requests, so many of them under way at any time. Returns what became of them, and the seconds."""
    tally, start = Tally(), time.perf_counter()
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await tally.run(send, number)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return tally, time.perf_counter() - start


async def closed_loop(send: Send, concurrency: int, seconds: float) -> tuple[Tally, float]:
    """So many under way at any time. Returns what became of them and how long it really took."""
    tally, start = Tally(), time.perf_counter()
    end = start + seconds
    numbers = iter(range(1 << 40))

    async def work() -> None:
        while time.perf_counter() < end:
            await tally.run(send, next(numbers))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return tally, time.perf_counter() - start


async def open_loop(send: Send, rate: float, seconds: float, seed: int = 0) -> tuple[Tally, float]:
    """Poisson arrivals at ``rate`` for so many seconds, whatever the server does.

    Returns what became of them, and the seconds until the last answer.
    """
    rng = np.random.default_rng(seed)
    tally, start = Tally(), time.perf_counter()
    tasks: list[asyncio.Task[None]] = []
    due = start
    while due < start + seconds:
        due += rng.exponential(1 / rate)
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(tally.run(send, len(tasks))))
    await asyncio.gather(*tasks)
    return tally, time.perf_counter() - start
