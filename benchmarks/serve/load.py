"""Load on a server from this machine: prebuilt requests over raw connections, so that the client costs little."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OUTPUTS_PARAMETERS = {"binary_data": True}
Send = Callable[[int], Awaitable[int]]
"""Sends sample ``i`` and returns the HTTP status, or its counterpart."""


@dataclass
class Tally:
    """What became of requests: ``done`` and ``refused`` hold seconds from start to answer, ``at`` when answers came."""

    done: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    failed: int = 0

    async def run(self, send: Send, number: int) -> None:
        """Send one and count what comes."""
        start = time.perf_counter()
        try:
            status = await send(number)
        except (OSError, EOFError):
            status = 0
        now = time.perf_counter()
        if status == 200:
            self.done.append(now - start)
            self.at.append(now)
        elif status in (429, 503):
            self.refused.append(now - start)
        else:
            self.failed += 1

    def summary(self, seconds: float) -> dict[str, Any]:
        """Answers per second, and percentiles in milliseconds."""
        found: dict[str, Any] = {"per_s": len(self.done) / seconds, "done": len(self.done), "failed": self.failed}
        for name, times in (("done", self.done), ("refused", self.refused)):
            if times:
                values = np.percentile(np.array(times) * 1e3, (50, 90, 99)).round(3).tolist()
                found[f"{name}_ms"] = dict(zip(("p50", "p90", "p99"), values, strict=True))
        found["refused"] = len(self.refused)
        return found


class Http:
    """Binary requests over keep-alive connections, as many as are ever under way at once."""

    def __init__(self, port: int, model: str, samples: Sequence[dict[str, np.ndarray]], output: str) -> None:
        self._port = port
        self._requests = [self._encode(model, feeds, output) for feeds in samples]
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @staticmethod
    def _encode(model: str, feeds: dict[str, np.ndarray], output: str) -> bytes:
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
        body = head + b"".join(array.tobytes() for array in feeds.values())
        lines = [
            f"POST /v2/models/{model}/infer HTTP/1.1",
            "host: localhost",
            f"inference-header-content-length: {len(head)}",
            f"content-length: {len(body)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def send(self, number: int) -> int:
        """Send a sample and read the whole answer."""
        pair = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = pair
        writer.write(self._requests[number % len(self._requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        self._free.append(pair)
        return int(head[9:12])

    async def close(self) -> None:
        """Close every connection."""
        for _, writer in self._free:
            writer.close()


class Grpc:
    """ModelInfer with raw contents over one channel."""

    def __init__(self, port: int, model: str, samples: Sequence[dict[str, np.ndarray]], output: str) -> None:
        import grpc

        from espalier.serve.rpc.messages import SERVICE, message

        self._error = grpc.aio.AioRpcError
        self._refusals = {grpc.StatusCode.RESOURCE_EXHAUSTED: 429, grpc.StatusCode.UNAVAILABLE: 503}
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._call = self._channel.unary_unary(f"/{SERVICE}/ModelInfer")
        self._requests = []
        for feeds in samples:
            request = message("ModelInferRequest")(model_name=model)
            request.outputs.add(name=output)
            for name, array in feeds.items():
                request.inputs.add(name=name, datatype="INT64", shape=array.shape)
                request.raw_input_contents.append(array.tobytes())
            self._requests.append(request.SerializeToString())

    async def send(self, number: int) -> int:
        """Send a sample and wait for the answer."""
        try:
            await self._call(self._requests[number % len(self._requests)], timeout=30)
        except self._error as error:
            return self._refusals.get(error.code(), 500)
        return 200

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


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
    """Poisson arrivals at ``rate`` a second, whatever the server does."""
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
    return tally, seconds
