"""What happens under load, when clients leave, and at the end."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from espalier.scheduler import Limits

INFER = "/v2/models/slow/infer"
MODELS = {"slow": Path("nowhere")}


def request(value: int = 1, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [value]}
    return {"inputs": [tensor], "parameters": parameters}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@contextmanager
def held(client: Any, slow: Any, requests: int = 1) -> Iterator[ThreadPoolExecutor]:
    """The engine is held with so many requests, one for each worker that has taken a batch; what comes now waits."""
    slow.go.clear()
    with ThreadPoolExecutor(8) as pool:
        for number in range(101, 101 + requests):
            pool.submit(client.post, INFER, request(number))
            until(lambda number=number: number in slow.started)
        try:
            yield pool
        finally:
            slow.go.set()


def test_more_than_may_wait_is_refused(start: Callable[..., Any], slow: Any, infer_request: Any) -> None:
    with start(MODELS, limits=Limits(waiting=2)) as client, held(client, slow) as pool:
        taken = [pool.submit(client.post, INFER, request()) for _ in range(2)]
        until(lambda: client.server.service.dispatcher.waiting == 2)
        began = time.monotonic()
        status, headers, body = client.send("POST", INFER, request())
        assert time.monotonic() - began < 1
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert "wait already" in json.loads(body)["error"]
        with pytest.raises(grpc.RpcError) as caught:
            client.call("ModelInfer", infer_request("slow", {"ids": ("INT64", np.ones((1, 1), np.int64))}))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["retry-after"]
        slow.go.set()
        assert [future.result()[0] for future in taken] == [200, 200]
        assert client.post(INFER, request())[0] == 200


def test_a_request_that_could_never_wait_is_wrong(start: Callable[..., Any], slow: Any) -> None:
    tensor = {"name": "ids", "shape": [3, 1], "datatype": "INT64", "data": [1, 2, 3]}
    with start(MODELS, limits=Limits(waiting=2)) as client:
        status, found = client.post(INFER, {"inputs": [tensor]})
        assert status == 400
        assert "in parts" in found["error"]


def test_a_client_that_leaves_takes_its_work_along(start: Callable[..., Any], slow: Any, infer_request: Any) -> None:
    with start(MODELS) as client, held(client, slow):
        dispatcher = client.server.service.dispatcher
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        connection.request("POST", INFER, json.dumps(request(500)))
        until(lambda: dispatcher.waiting == 1)
        connection.close()
        until(lambda: dispatcher.waiting == 0)
        late = infer_request("slow", {"ids": ("INT64", np.full((1, 1), 500))})
        with pytest.raises(grpc.RpcError) as caught:
            client.call("ModelInfer", late, timeout=0.2)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: dispatcher.waiting == 0)
        slow.go.set()
        assert client.post(INFER, request())[0] == 200
        assert 500 not in slow.started


def test_a_deadline_that_passes_in_the_queue(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS) as client, held(client, slow) as pool:
        late = pool.submit(client.post, INFER, request(500, timeout=20_000))
        until(lambda: client.server.service.dispatcher.waiting == 1)
        time.sleep(0.05)
        slow.go.set()
        status, found = late.result()
        assert status == 504
        assert "deadline" in found["error"]
        assert 500 not in slow.started


def test_the_urgent_goes_first(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS, limits=Limits(items=1)) as client, held(client, slow, 2) as pool:  # each is a full batch
        for number, priority in enumerate((2, 1, 0), 201):
            pool.submit(client.post, INFER, request(number, priority=priority))
            until(lambda number=number: client.server.service.dispatcher.waiting == number - 200)
        slow.go.set()
        until(lambda: len(slow.started) == 13)  # eight to learn, two that held
        assert slow.started[-3:] == [203, 202, 201]


def test_what_is_under_way_is_answered_at_the_end(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS, drain_delay=0.3) as client, held(client, slow) as pool:
        taken = [pool.submit(client.post, INFER, request(number)) for number in range(3)]
        until(lambda: client.server.service.dispatcher.waiting == 3)
        client.loop.call_soon_threadsafe(client.server.stop)
        until(lambda: client.get("/v2/health/ready")[0] == 503)
        assert client.get("/v2/health/live")[0] == 200
        while client.server.service._accepting:
            time.sleep(0.01)
        status, headers, _ = client.send("POST", INFER, request())
        assert (status, headers["retry-after"]) == (503, "1")
        slow.go.set()
        assert [future.result()[0] for future in taken] == [200] * 3


def test_metrics_tell(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS) as client:
        assert client.post(INFER, request())[0] == 200
        assert client.post("/v2/models/x/infer", request())[0] == 404
        text = client.send("GET", "/metrics")[2].decode()
        for line in (
            r'espalier_requests_total\{code="404",endpoint="infer",model="",protocol="http"\} 1.0',
            r"espalier_queue_sequences 0.0",
            r"espalier_ready 1.0",
            r'espalier_batch_tokens_count\{model="slow"\} \d',
            r'espalier_stage_seconds_count\{stage="queue"\} \d',
        ):
            assert re.search(line, text), line


def test_a_bug_is_an_internal_error_and_the_end_of_nothing(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS) as client:
        good, slow.run_ragged = slow.run_ragged, lambda names, rows: 1 / 0
        status, found = client.post(INFER, request())
        assert status == 500
        assert "zero" not in found["error"]
        slow.run_ragged = good
        assert client.post(INFER, request())[0] == 200


def connect(port: int, data: bytes = b"") -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port), timeout=10)
    found.sendall(data)
    return found


def ends(connection: socket.socket) -> bytes:
    """What is still said before the other side closes."""
    with connection:
        parts = []
        while part := connection.recv(4096):
            parts.append(part)
        return b"".join(parts)


def test_those_who_dawdle_are_cut_off(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS, head_timeout=0.2, body_timeout=0.2, idle_timeout=1.0) as client:
        assert ends(connect(client.port, b"GET /v2 HTTP/1.1\r\nhost:")) == b""
        head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{" % INFER.encode()
        assert ends(connect(client.port, head)).startswith(b"HTTP/1.1 408")
        assert ends(connect(client.port)) == b""
        assert client.post(INFER, request())[0] == 200


def test_a_large_head_is_refused(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS, head_bytes=4096) as client:
        for head in (b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 5000, b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 5000 + b"\r\n\r\n"):
            assert ends(connect(client.port, head)).startswith(b"HTTP/1.1 431")
        assert client.post(INFER, request())[0] == 200


def test_many_idle_connections_harm_nobody(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS) as client:
        idle = [connect(client.port) for _ in range(300)]
        assert client.post(INFER, request())[0] == 200
        for connection in idle:
            connection.close()


def test_batches_form_while_the_engine_works(start: Callable[..., Any], slow: Any) -> None:
    sizes: list[int] = []
    plain = slow.run_ragged

    def counted(names: Any, rows: list[Any]) -> Any:
        sizes.append(len(rows))
        return plain(names, rows)

    slow.run_ragged = counted
    with start(MODELS) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: client.post(INFER, request(number)), range(64)))
    assert [found["outputs"][0]["data"] for _, found in answers] == [[number] for number in range(64)]
    assert max(sizes) > 4
    assert threading.active_count() < 50
