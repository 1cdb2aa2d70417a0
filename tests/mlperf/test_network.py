"""LoadGen's side and the nodes' side of a networked system under test."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.data import Feature
from espalier.errors import ConfigError, DataError, EngineError, InputError
from espalier.mlperf.features import Samples
from espalier.mlperf.network import node as network_node
from espalier.mlperf.network import wire
from espalier.mlperf.network.node import Node
from espalier.mlperf.network.qdl import QueryDispatch
from espalier.scheduler import Limits


class Sums:
    """An engine whose answer is the sum of the ids, and their number."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.seen: list[int] = []

    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        time.sleep(self.seconds)
        self.seen += [len(f.ids) for f in features]
        return [np.array([f.ids.sum(), (f.types == 1).sum()], np.float32) for f in features]


class FakeLoadGen:
    """Collects answers."""

    def __init__(self) -> None:
        self.answers: dict[int, np.ndarray] = {}
        self.done = threading.Condition()

    def QuerySampleResponse(self, number: int, address: int, size: int) -> tuple[int, bytes]:  # noqa: N802
        import ctypes

        return number, ctypes.string_at(address, size) if size else b""

    def QuerySamplesComplete(self, responses: list[tuple[int, bytes]]) -> None:  # noqa: N802
        with self.done:
            for number, data in responses:
                assert number not in self.answers
                self.answers[number] = np.frombuffer(data, np.float32)
            self.done.notify_all()

    def wait(self, count: int) -> None:
        with self.done:
            assert self.done.wait_for(lambda: len(self.answers) >= count, 20)


def make_samples(count: int = 40) -> Samples:
    rng = np.random.default_rng(0)
    features = []
    for _ in range(count):
        length = int(rng.integers(2, 30))
        types = np.zeros(length, np.int8)
        types[length // 2 :] = 1
        features.append(Feature(rng.integers(1, 100, length).astype(np.int32), types, {}))
    return Samples.of(features)


SAMPLES = make_samples()


def start(engine: Any, **options: Any) -> Node:
    return Node(engine, name="n", host="127.0.0.1", port=0, **{"limits": Limits(waiting=None), **options})


def queries(count: int) -> list[Any]:
    return [SimpleNamespace(id=1000 + i, index=i % len(SAMPLES)) for i in range(count)]


def check(loadgen: FakeLoadGen, count: int) -> None:
    assert len(loadgen.answers) == count
    for number, answer in loadgen.answers.items():
        feature = SAMPLES[(number - 1000) % len(SAMPLES)]
        assert answer.tolist() == [feature.ids.sum(), len(feature.ids) - len(feature.ids) // 2]


def test_every_query_is_answered_by_some_node() -> None:
    engines = [Sums(), Sums(0.002)]
    nodes = [start(engine) for engine in engines]
    loadgen = FakeLoadGen()
    qdl = QueryDispatch([f"127.0.0.1:{node.port}" for node in nodes], None, SAMPLES, loadgen)
    before = [len(engine.seen) for engine in engines]
    assert qdl._dispatch.name == "Network SUT: n, n"
    qdl._issue(queries(500))
    loadgen.wait(500)
    check(loadgen, 500)
    assert all(len(engine.seen) > start for engine, start in zip(engines, before, strict=True))
    assert qdl.times().shape == (500, 2)
    assert not qdl.failures
    qdl.close()
    for node in nodes:
        node.close()


def test_what_a_lost_node_had_is_answered_by_another() -> None:
    nodes = [start(Sums(0.01), limits=Limits(waiting=None, items=4)) for _ in range(2)]
    loadgen = FakeLoadGen()
    qdl = QueryDispatch([f"127.0.0.1:{node.port}" for node in nodes], None, SAMPLES, loadgen)
    qdl._issue(queries(200))
    loadgen.wait(20)
    for connection in list(nodes[0]._connections):
        connection.close()
    loadgen.wait(200)
    check(loadgen, 200)
    assert len(qdl.lost) == 1
    for connection in list(nodes[1]._connections):
        connection.close()
    qdl.issue([1], [0])
    loadgen.wait(201)
    assert qdl.failures == ["EngineError: no node is left"]
    qdl.close()
    for node in nodes:
        node.close()


def test_a_failing_query_is_answered_with_nothing() -> None:
    node = start(Sums(), limits=Limits(tokens=10))
    loadgen = FakeLoadGen()
    qdl = QueryDispatch([f"127.0.0.1:{node.port}"], None, SAMPLES, loadgen)
    long = next(i for i in range(len(SAMPLES)) if len(SAMPLES[i].ids) > 10)
    qdl.issue([1], [long])
    loadgen.wait(1)
    assert loadgen.answers[1].size == 0
    assert "exceeds the budget" in qdl.failures[0]
    qdl.close()
    node.close()


def test_the_token_is_wanted() -> None:
    node = start(Sums(), token="secret")
    address = f"127.0.0.1:{node.port}"
    with pytest.raises(EngineError, match="token"):
        QueryDispatch([address], None, SAMPLES, FakeLoadGen())
    QueryDispatch([address], "secret", SAMPLES, FakeLoadGen()).close()
    node.close()


def test_addresses_that_are_none() -> None:
    for address in ("nowhere", ":1", "a:b", ""):
        with pytest.raises(InputError, match="HOST:PORT"):
            QueryDispatch([address], None, SAMPLES, FakeLoadGen())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen"):
            Node(Sums(), name="n", host="127.0.0.1", port=port, limits=Limits())
    with pytest.raises(EngineError, match="no node answers"):
        QueryDispatch([f"127.0.0.1:{port}"], None, SAMPLES, FakeLoadGen())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        wire.frame(wire.QUERY, bytes(16)),
        wire.frame(wire.HELLO, b"ESPQDL9\0"),
        wire.frame(wire.HELLO, wire.MAGIC) + wire.frame(wire.QUERY, bytes(13)),
        wire.frame(wire.HELLO, wire.MAGIC) + wire.frame(wire.QUERY, struct.pack("<QIi", 1, 2, 1)),
        wire.frame(wire.HELLO, wire.MAGIC) + wire.frame(99),
        wire.frame(wire.HELLO, wire.MAGIC) + struct.pack("<IB", 1 << 30, wire.QUERY),
        struct.pack("<IB", 0, 0),
    ],
)
def test_noise_closes_its_own_connection_only(data: bytes) -> None:
    node = start(Sums())
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as sock:
        sock.sendall(wire.frame(wire.HELLO, wire.MAGIC))
        ((kind, payload),) = wire.Frames().feed(sock.recv(4096))
        assert kind == wire.NAME
        assert json.loads(bytes(payload))["tokens_per_s"] > 0
    node.close()


@given(st.lists(st.tuples(st.integers(1, 6), st.binary(max_size=20)), max_size=8), st.integers(1, 7))
def test_frames_survive_any_cuts(frames: list[tuple[int, bytes]], size: int) -> None:
    stream = b"".join(wire.frame(kind, payload) for kind, payload in frames)
    cutter = wire.Frames()
    found = [(kind, bytes(p)) for at in range(0, len(stream), size) for kind, p in cutter.feed(stream[at : at + size])]
    assert found == frames


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 2**64 - 1))
def test_queries_survive(ids: list[int], leading: int, number: int) -> None:
    types = np.ones(len(ids), np.int8)
    types[:leading] = 0
    ((_, payload),) = wire.Frames().feed(wire.query(number, Feature(np.array(ids, np.int32), types, {})))
    back, feature = wire.read_query(payload)
    assert (back, feature.ids.tolist(), feature.types.tolist()) == (number, ids, types.tolist())


def test_other_token_types_are_refused() -> None:
    with pytest.raises(DataError, match="zeros followed by ones"):
        wire.query(1, Feature(np.ones(3, np.int32), np.array([0, 1, 0], np.int8), {}))


def test_under_loadgen_itself(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loadgen = pytest.importorskip("mlperf_loadgen", reason="LoadGen is not installed here")
    node = start(Sums())
    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = 200
    settings.min_duration_ms, settings.min_query_count, settings.max_query_count = 100, 50, 50
    qdl = QueryDispatch([f"127.0.0.1:{node.port}"], None, SAMPLES, loadgen)
    log = loadgen.LogSettings()
    log.log_output.outdir = str(tmp_path)
    log.log_output.copy_summary_to_stdout = False
    handle = qdl.construct(loadgen)
    library = loadgen.ConstructQSL(len(SAMPLES), len(SAMPLES), lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(handle, library, settings, log, str(tmp_path / "audit.config"))
    loadgen.DestroyQSL(library)
    qdl.destroy(loadgen, handle)
    qdl.close()
    node.close()
    summary = (tmp_path / "mlperf_log_summary.txt").read_text()
    assert "Network SUT: n" in summary
    assert len(qdl.times()) == 50
    assert not qdl.failures


def test_a_node_that_does_not_describe_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "description", lambda _: wire.frame(wire.NAME, b'{"name": "n", "tokens_per_s": 1}'))
    node = start(Sums())
    try:
        with pytest.raises(EngineError, match="of another release"):
            QueryDispatch([f"127.0.0.1:{node.port}"], None, SAMPLES, FakeLoadGen())
    finally:
        node.close()


def test_a_client_that_does_not_read_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long:
        def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
            return [np.zeros(200_000, np.float32) for _ in features]

    monkeypatch.setattr(network_node, "SEND_SECONDS", 1)
    node = start(Long())
    hello = wire.frame(wire.HELLO, wire.MAGIC)
    with (
        socket.create_connection(("127.0.0.1", node.port), timeout=20) as deaf,
        socket.create_connection(("127.0.0.1", node.port), timeout=20) as other,
    ):
        deaf.sendall(hello + b"".join(wire.query(i, SAMPLES[0]) for i in range(64)))  # 51 MB of answers
        other.sendall(hello + wire.query(7, SAMPLES[0]))
        frames, found = wire.Frames(), []
        while wire.ANSWER not in found:
            found += [kind for kind, _ in frames.feed(other.recv(1 << 20))]
        deadline = time.monotonic() + 20
        while len(node._connections) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(node._connections) == 1  # it has hung up on the other
    node.close()
