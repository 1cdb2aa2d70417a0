"""A node of a networked system under test: batches what comes from the network, as the local one does."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from espalier.data import Feature
from espalier.errors import ConfigError, DataError, SchedulingError
from espalier.mlperf.engines import Engine
from espalier.mlperf.network import wire
from espalier.mlperf.system import Machine, describe_machine
from espalier.scheduler import Item, Limits, Scheduler

log = logging.getLogger("espalier.mlperf")

_RECEIVE = 1 << 18
_PROBE_TOKENS = 128
SEND_SECONDS = 5
"""How long a client may keep its answers waiting. One that does not read would hold up the answers of all others."""


class Node:
    """Listens, and answers queries until :meth:`close`. ``token``: what clients must send, None for nothing.

    ``machine``: what submissions say of this one, without an accelerator for None. ``lanes``: batches that the engine
    works on at a time.

    ``port`` 0 takes a free one; the attribute says which. Raises ConfigError for an address that cannot be had.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        host: str,
        port: int,
        limits: Limits,
        token: str | None = None,
        machine: Machine | None = None,
        lanes: int = 1,
    ) -> None:
        self._name = name
        self._machine = asdict(machine or describe_machine())
        self._token = (token or "").encode()
        self._tokens_per_s = _measure(engine)
        self._scheduler = Scheduler(lambda _, batch: engine.run(batch), self._finish, limits, workers=2, lanes=lanes)
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            self._scheduler.close()
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[_Connection] = set()
        self._accepting = threading.Thread(target=self._accept, name="espalier-node", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Stop listening, finish what is under way, and close."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self._scheduler.close()
        for connection in list(self._connections):
            connection.close()

    def description(self) -> bytes:
        """The NAME frame."""
        rate = self._scheduler.tokens_per_second(None) or self._tokens_per_s
        found = {"name": self._name, "tokens_per_s": rate, "machine": self._machine}
        return wire.frame(wire.NAME, json.dumps(found).encode())

    def admits(self, hello: memoryview) -> bool:
        """Whether a HELLO is of this protocol, and with the right token."""
        data = bytes(hello)
        return data.startswith(wire.MAGIC) and hmac.compare_digest(data[len(wire.MAGIC) :], self._token)

    def submit(self, connection: _Connection, queries: list[tuple[int, Feature]]) -> None:
        """Queue queries; what cannot be queued is answered as failed."""
        items = [Item(feature, len(feature.ids), (connection, number)) for number, feature in queries]
        try:
            self._scheduler.submit(*items)
        except (SchedulingError, ValueError) as error:
            connection.send(b"".join(wire.failed(number, str(error)) for number, _ in queries))

    def gone(self, connection: _Connection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return  # closed
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
            log.info("connection from %s", peer[0])
            self._connections.add(_Connection(self, sock))

    def _finish(self, items: list[Item], results: Sequence[Any]) -> None:
        answers: dict[_Connection, list[bytes]] = {}
        for item, result in zip(items, results, strict=True):
            connection, number = item.tag
            bad = isinstance(result, Exception)
            data = wire.failed(number, str(result)) if bad else wire.answer(number, np.asarray(result))
            answers.setdefault(connection, []).append(data)
        for connection, frames in answers.items():
            connection.send(b"".join(frames))


class _Connection:
    """One client: a thread that reads, and answers sent from the scheduler's threads."""

    def __init__(self, node: Node, sock: socket.socket) -> None:
        self._node = node
        self._socket = sock
        self._sending = threading.Lock()
        self._admitted = False
        threading.Thread(target=self._read, name="espalier-node-connection", daemon=True).start()

    def send(self, data: bytes) -> None:
        """Send frames; a client that is gone, or does not read, is not missed."""
        try:
            with self._sending:
                self._socket.sendall(data)
        except BlockingIOError:
            log.warning("a connection was closed: it did not read its answers for %d s", SEND_SECONDS)
            self.close()
        except OSError:
            self.close()

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):  # it may be closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._node.gone(self)

    def _read(self) -> None:
        frames = wire.Frames()
        try:
            while data := self._socket.recv(_RECEIVE):
                queries = [
                    wire.read_query(payload) for kind, payload in frames.feed(data) if self._is_query(kind, payload)
                ]
                if queries:
                    self._node.submit(self, queries)
        except (DataError, OSError) as error:
            log.warning("a connection was closed: %s", error)
        finally:
            self.close()
            self._socket.close()

    def _is_query(self, kind: int, payload: memoryview) -> bool:
        """Whether a frame is a query; the other kinds are dealt with. Raises DataError for what is out of place."""
        if kind == wire.HELLO and self._node.admits(payload):
            self._admitted = True
        if not self._admitted:
            raise DataError("it did not begin with a HELLO of this protocol and the right token")
        if kind in (wire.HELLO, wire.PING):
            self.send(self._node.description())
        elif kind != wire.QUERY:
            raise DataError(f"a client does not send frames of kind {kind}")
        return kind == wire.QUERY


def _measure(engine: Engine) -> float:
    """Tokens per second of a few batches, which also warm the engine."""
    feature = Feature(np.ones(_PROBE_TOKENS, np.int32), np.zeros(_PROBE_TOKENS, np.int8), {})
    engine.run([feature])
    start = time.perf_counter()
    for _ in range(3):
        engine.run([feature] * 8)
    return 3 * 8 * _PROBE_TOKENS / max(time.perf_counter() - start, 1e-6)
