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
from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.cluster.routing import Node, Router
from espalier.data import Feature
from espalier.errors import DataError, EngineError, InputError
from espalier.mlperf.features import Samples
from espalier.mlperf.network import wire
from espalier.mlperf.sut import SystemUnderTest
from espalier.mlperf.system import Machine

PREFIX = "Network SUT"
CONNECTIONS = 2
"""To each node."""
_LOST = 0
_RECEIVE = 1 << 18
_TIMEOUT_S = 10.0
_WINDOW_S = 0.5
"""Seconds of work at most that a node is given ahead."""


class Remote:
    """A node, and the connections to it from :meth:`open` on. Raises EngineError when it cannot be reached."""

    def __init__(self, address: str, token: str | None, on_answers: Callable[[Remote, list[Any]], None]) -> None:
        self.address = address
        self._token = token or ""
        self._on_answers = on_answers
        self._links: list[_Link] = []
        self._turn = 0
        found = self._describe()
        self.name = str(found["name"])
        self.machine = _machine(found, address)
        self.node = Node(address, float(found["tokens_per_s"]))

    def open(self) -> None:
        """Connect. Raises EngineError."""
        self._links = [_Link(self, _connect(self.address, self._token)) for _ in range(CONNECTIONS)]

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
        self._on_answers(self, [(_LOST, memoryview(why.encode()))])

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


@dataclass(frozen=True, slots=True)
class _Query:
    number: int
    feature: Feature
    issued: float


Finish = Callable[[list[int], list[Any], list[float]], None]
"""Told ids, answers (float32 ``[]``, or an exception) and when each was sent for."""


class Dispatch:
    """Sends sequences to nodes and hands their answers to ``finish``, from the connections' threads.

    ``lost`` says which nodes went away; others answer what those had. Raises EngineError when a node cannot be
    reached, InputError for what is no address.
    """

    def __init__(self, addresses: Sequence[str], token: str | None, finish: Finish) -> None:
        self.lost: list[str] = []
        self._finish = finish
        self._lock = threading.Lock()
        self._kept: deque[_Query] = deque()
        self._under_way: dict[int, tuple[Remote, _Query]] = {}
        remotes = [Remote(address, token, self._answered) for address in addresses]
        self._remotes = {id(remote.node): remote for remote in remotes}
        self._router = Router([remote.node for remote in remotes], window=_WINDOW_S)
        for remote in remotes:
            remote.open()

    @property
    def name(self) -> str:
        """The system's name, which every node is asked for now."""
        return f"{PREFIX}: {', '.join(remote.ask_name() for remote in self._remotes.values())}"

    @property
    def machines(self) -> list[Machine]:
        """What the nodes said of their machines."""
        return [remote.machine for remote in self._remotes.values()]

    def send(self, numbers: Sequence[int], features: Sequence[Feature]) -> None:
        """Send sequences, each under its id."""
        now = time.perf_counter()
        with self._lock:
            self._kept.extend(_Query(n, feature, now) for n, feature in zip(numbers, features, strict=True))
            given_up = self._pass_on()
        self._give_up(given_up)

    def close(self) -> None:
        """Hang up everywhere."""
        for remote in self._remotes.values():
            remote.close()

    def _pass_on(self) -> list[_Query]:
        """Send what nodes have room for. Returns what no node is left for."""
        while self._kept:
            one = self._kept[0]
            node = self._router.route(len(one.feature.ids), time.perf_counter())
            if node is None:
                break
            self._kept.popleft()
            remote = self._remotes[id(node)]
            self._under_way[one.number] = (remote, one)
            remote.send(wire.query(one.number, one.feature))
        if not all(node.down for node in self._router.nodes):
            return []
        given_up = list(self._kept)
        self._kept.clear()
        return given_up

    def _give_up(self, queries: list[_Query]) -> None:
        if queries:  # whoever waits for them would wait for ever
            errors = [EngineError("no node is left") for _ in queries]
            self._finish([one.number for one in queries], errors, [one.issued for one in queries])

    def _answered(self, remote: Remote, frames: list[tuple[int, memoryview]]) -> None:
        """Called by the connections' threads; kind 0 says that the node is lost."""
        done: list[_Query] = []
        answers: list[Any] = []
        with self._lock:
            now = time.perf_counter()
            for kind, payload in frames:
                if kind == _LOST:
                    self._forget(remote, bytes(payload).decode())
                    continue
                number, rest = wire.read_answer(payload)
                known = self._under_way.pop(number, None)
                if known is None:
                    continue  # answered already, by another node
                known[0].node.answered(len(known[1].feature.ids), now)
                done.append(known[1])
                bad = kind == wire.FAILED
                answers.append(EngineError(bytes(rest).decode()) if bad else np.frombuffer(rest, "<f4"))
            given_up = self._pass_on()
        if done:
            self._finish([one.number for one in done], answers, [one.issued for one in done])
        self._give_up(given_up)

    def _forget(self, remote: Remote, why: str) -> None:
        """A node is gone: what it had goes to the others; inference may be repeated."""
        if remote.node.down:
            return
        remote.node.down = True
        remote.node.lost()
        self.lost.append(why)
        again = [one for other, one in self._under_way.values() if other is remote]
        for one in again:
            del self._under_way[one.number]
        self._kept.extendleft(reversed(again))


class RemoteEngine:
    """Nodes as an engine: :meth:`run` sends sequences and waits for the answers. For probes, not for LoadGen."""

    version = "over the network"

    def __init__(self, addresses: Sequence[str], token: str | None) -> None:
        self._answers: dict[int, Any] = {}
        self._arrived = threading.Condition()
        self._dispatch = Dispatch(addresses, token, self._finish)

    @property
    def machines(self) -> list[Machine]:
        """The nodes' machines."""
        return self._dispatch.machines

    def warm_up(self, features: Sequence[Feature]) -> None:
        """Send a few; the nodes have warmed up by themselves. Raises EngineError."""
        self.run(features[:4])

    def run(self, features: Sequence[Feature]) -> list[np.ndarray]:
        """The answer to each sequence. Raises EngineError."""
        with self._arrived:
            self._answers.clear()
        self._dispatch.send(range(len(features)), features)
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._answers) == len(features))
            found = [self._answers[number] for number in range(len(features))]
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        return found

    def close(self) -> None:
        """Hang up."""
        self._dispatch.close()

    def _finish(self, numbers: list[int], answers: list[Any], issued: list[float]) -> None:
        with self._arrived:
            self._answers.update(zip(numbers, answers, strict=True))
            self._arrived.notify_all()


class QueryDispatch(SystemUnderTest):
    """LoadGen's callbacks over a :class:`Dispatch`."""

    def __init__(self, addresses: Sequence[str], token: str | None, samples: Samples, loadgen: Any) -> None:
        super().__init__(samples, loadgen)
        self._lock = threading.Lock()
        self._dispatch = Dispatch(addresses, token, self._finish)

    def construct(self, loadgen: Any) -> Any:
        return loadgen.ConstructQDL(self._issue, self.flush, lambda: self._dispatch.name)

    def destroy(self, loadgen: Any, handle: Any) -> None:
        loadgen.DestroyQDL(handle)

    @property
    def lost(self) -> list[str]:
        """The nodes that went away, and why."""
        return self._dispatch.lost

    def issue(self, ids: list[int], indices: list[int]) -> None:
        self._dispatch.send(ids, [self._samples[i] for i in indices])

    def close(self) -> None:
        self._dispatch.close()

    def _issue(self, queries: Sequence[Any]) -> None:
        self.issue([query.id for query in queries], [query.index for query in queries])

    def _finish(self, numbers: list[int], answers: list[Any], issued: list[float]) -> None:
        with self._lock:
            self._answer(numbers, answers, issued)


def _machine(said: dict[str, Any], address: str) -> Machine:
    try:
        return Machine(**said["machine"])
    except (KeyError, TypeError) as error:
        raise EngineError(f"the node at {address} is of another release: run the same on all machines") from error


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
