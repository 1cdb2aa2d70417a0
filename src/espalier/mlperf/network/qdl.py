"""The query dispatch library: LoadGen's side of a networked system under test.

It sends each sequence by itself, as it is, and keeps nothing: batching is the nodes' affair, and no answer is used
twice. With several nodes a sequence goes to the one that would be done first; what all of them have no room for waits
here, so that whoever is done first takes from it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from espalier.cluster.routing import Node, Router
from espalier.errors import DataError, EngineError, InputError
from espalier.mlperf.features import Samples
from espalier.mlperf.network import wire

PREFIX = "Network SUT"
CONNECTIONS = 2
"""To each node."""
_RECEIVE = 1 << 18
_TIMEOUT_S = 10.0
_WINDOW_S = 0.5
"""Seconds of work at most that a node is given ahead."""


class Remote:
    """A node, and the connections to it. Raises EngineError when it cannot be reached."""

    def __init__(self, address: str, token: str | None, on_answers: Callable[[Remote, list[Any]], None]) -> None:
        self.address = address
        self._token = token or ""
        self._on_answers = on_answers
        self._links = [_Link(self, _connect(address, self._token)) for _ in range(CONNECTIONS)]
        self._turn = 0
        found = self._describe()
        self.name = str(found["name"])
        self.node = Node(address, float(found["tokens_per_s"]))

    def send(self, data: bytes) -> None:
        """Send a query over one of the connections."""
        self._turn = (self._turn + 1) % len(self._links)
        self._links[self._turn].send(data)

    def ask_name(self) -> str:
        """The node's name, by a round trip now. Raises EngineError."""
        self.name = str(self._describe()["name"])
        return self.name

    def answers(self, frames: list[tuple[int, memoryview]]) -> None:
        """What came over one of the connections."""
        self._on_answers(self, [frame for frame in frames if frame[0] in (wire.ANSWER, wire.FAILED)])

    def lost(self, why: str) -> None:
        """A connection has ended."""
        self._on_answers(self, [(0, memoryview(why.encode()))])

    def close(self) -> None:
        """Hang up."""
        for link in self._links:
            link.close()

    def _describe(self) -> dict[str, Any]:
        """A round trip over a connection of its own."""
        with _connect(self.address, self._token) as sock:
            frames = wire.Frames()
            while data := sock.recv(_RECEIVE):
                for kind, payload in frames.feed(data):
                    if kind == wire.NAME:
                        found: dict[str, Any] = json.loads(bytes(payload))
                        return found
        raise EngineError(f"the node at {self.address} did not say its name: is the token right?")


class _Link:
    """A connection, with a thread that reads and one that writes, so that a slow node holds up no other."""

    def __init__(self, remote: Remote, sock: socket.socket) -> None:
        self._remote = remote
        self._socket = sock
        sock.settimeout(None)
        self._waiting: deque[bytes] = deque()
        self._wake = threading.Event()
        self._open = True
        for work in (self._read, self._write):
            threading.Thread(target=work, name="espalier-qdl", daemon=True).start()

    def send(self, data: bytes) -> None:
        self._waiting.append(data)
        self._wake.set()

    def close(self) -> None:
        self._open = False
        self._wake.set()
        with contextlib.suppress(OSError):  # it may be closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reading side says so
            while self._open:
                self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    self._socket.sendall(self._waiting.popleft())

    def _read(self) -> None:
        frames = wire.Frames()
        why = "the node hung up"
        try:
            while data := self._socket.recv(_RECEIVE):
                self._remote.answers(list(frames.feed(data)))
        except (OSError, DataError) as error:
            why = str(error)
        if self._open:
            self._remote.lost(f"{self._remote.address}: {why}")


class QueryDispatch:
    """Sends LoadGen's queries to nodes and hands their answers back, in LoadGen's form.

    ``failures`` says what went wrong with queries, which are answered with nothing; ``lost`` which nodes went away,
    whose queries others answered. Raises EngineError when a node cannot be reached, InputError for what is no address.
    """

    def __init__(self, addresses: Sequence[str], samples: Samples, loadgen: Any, *, token: str | None = None) -> None:
        self.failures: list[str] = []
        self.lost: list[str] = []
        self._samples = samples
        self._lengths = samples.lengths.tolist()
        self._response = loadgen.QuerySampleResponse
        self._complete = loadgen.QuerySamplesComplete
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, int]] = deque()
        self._under_way: dict[int, tuple[Remote, int, float]] = {}
        self._issued: list[float] = []
        self._done: list[float] = []
        self._remotes = [Remote(address, token, self._answered) for address in addresses]
        self._by_node = {id(remote.node): remote for remote in self._remotes}
        self._router = Router([remote.node for remote in self._remotes], window=_WINDOW_S)

    def name(self) -> str:
        """The system's name, which every node is asked for."""
        return f"{PREFIX}: {', '.join(remote.ask_name() for remote in self._remotes)}"

    def issue(self, queries: Sequence[Any]) -> None:
        """LoadGen's callback."""
        with self._lock:
            self._kept.extend((query.id, query.index) for query in queries)
            self._dispatch()

    def flush(self) -> None:
        """LoadGen's other callback; nothing is ever held back."""
        return

    def times(self) -> np.ndarray:
        """float64 ``[queries, 2]``: seconds at which queries were sent to a node and answered."""
        return np.stack([np.array(self._issued), np.array(self._done)], axis=1)

    def close(self) -> None:
        """Hang up everywhere."""
        for remote in self._remotes:
            remote.close()

    def _dispatch(self) -> None:
        while self._kept:
            number, sample = self._kept[0]
            now = time.perf_counter()
            node = self._router.route(self._lengths[sample], now)
            if node is None:
                if all(other.down for other in self._router.nodes):
                    self._fail_everything()
                return
            self._kept.popleft()
            remote = self._by_node[id(node)]
            self._under_way[number] = (remote, sample, now)
            remote.send(wire.query(number, self._samples[sample]))

    def _answered(self, remote: Remote, frames: list[tuple[int, memoryview]]) -> None:
        """Called by the connections' threads. Kind 0 says that the node is lost."""
        responses: list[Any] = []
        arrays: list[np.ndarray] = []  # alive until LoadGen has copied them
        with self._lock:
            now = time.perf_counter()
            for kind, payload in frames:
                if kind == 0:
                    self._lost(remote, bytes(payload).decode())
                    continue
                number, rest = wire.read_answer(payload)
                known = self._under_way.pop(number, None)
                if known is None:
                    continue  # answered already, by another node
                known[0].node.answered(self._lengths[known[1]], now)
                self._issued.append(known[2])
                self._done.append(now)
                if kind == wire.FAILED:
                    self.failures.append(bytes(rest).decode())
                    rest = memoryview(b"")
                arrays.append(np.frombuffer(rest, np.uint8))
                responses.append(self._response(number, arrays[-1].__array_interface__["data"][0], len(rest)))
            self._dispatch()
        if responses:
            self._complete(responses)

    def _lost(self, remote: Remote, why: str) -> None:
        """A node is gone: what it had goes to the others; inference may be repeated."""
        if remote.node.down:
            return
        remote.node.down = True
        remote.node.lost()
        self.lost.append(why)
        again = [(number, sample) for number, (other, sample, _) in self._under_way.items() if other is remote]
        for number, _ in again:
            del self._under_way[number]
        self._kept.extendleft(reversed(again))

    def _fail_everything(self) -> None:
        """No node is left: LoadGen is told, or it would wait for ever."""
        numbers = [number for number, _ in self._kept]
        self._kept.clear()
        self.failures += ["no node is left"] * len(numbers)
        self._complete([self._response(number, 0, 0) for number in numbers])


def _connect(address: str, token: str) -> socket.socket:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise InputError(f"{address!r} is not an address; expected HOST:PORT, as a node says when it starts")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S)
    except OSError as error:
        raise EngineError(f"no node answers at {address}: {error.strerror or error}; is it running?") from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(wire.frame(wire.HELLO, wire.MAGIC + token.encode()))
    return sock
