"""Work by measured speed: every node tells its own HAProxy how fast the others are, and to give up on those that hang.

Once a second a node asks its HAProxy which servers it knows, asks each of those for its speed, and sets the weights in
proportion. A node that does not answer keeps its weight; whether it is alive is HAProxy's affair, unless it thinks that
of none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.cluster.settings import CHECK_S, CONNECT_S

PERIOD_S = 1.0
GIVE_UP_PERIOD_S = 0.1
MOST = 256
"""HAProxy's largest weight."""
_REPLICA = "SERVE_REPLICA_"  # as Ray names them; its own proxy is there too, as a last resort
_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Server:
    """A replica as HAProxy knows it."""

    backend: str
    name: str
    host: str
    port: int
    weight: int
    up: bool

    @property
    def path(self) -> str:
        """What HAProxy's commands call it."""
        return f"{self.backend}/{self.name}"


def read_servers(text: str) -> list[Server]:
    """The servers in HAProxy's answer to ``show servers state``; lines that are none are left out."""
    lines = text.splitlines()
    header = next((line[2:].split() for line in lines if line.startswith("# be_id")), [])
    found = []
    for line in lines:
        row = dict(zip(header, line.split(), strict=False))
        if not line.startswith("#") and row.get("srv_name", "").startswith(_REPLICA) and len(row) == len(header):
            up = row["srv_op_state"] == "2"
            where = (row["srv_addr"], int(row["srv_port"]), int(row["srv_uweight"]), up)
            found.append(Server(row["be_name"], row["srv_name"], *where))
    return found


def weights(speeds: Mapping[str, float]) -> dict[str, int]:
    """HAProxy's weights for speeds by name: in proportion, the fastest 100, none below 1."""
    fastest = max(speeds.values(), default=0.0)
    return {name: max(1, min(MOST, round(100 * speed / fastest))) for name, speed in speeds.items() if fastest > 0}


async def ask_haproxy(socket: Path, command: str) -> str:
    """HAProxy's answer to a command. Raises OSError, TimeoutError."""
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            writer.write(f"{command}\n".encode())
            return (await reader.read()).decode()
        finally:
            writer.close()


async def ask_status(host: str, port: int, token: str | None) -> dict[str, Any] | None:
    """What a node says at ``/status``; None when it says nothing of use."""
    lines = ["GET /status HTTP/1.1", f"host: {host}", "connection: close"]
    lines += [f"authorization: Bearer {token}"] if token else []
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write("\r\n".join([*lines, "", ""]).encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        found = json.loads(body)
        if b" 200 " in head.partition(b"\r\n")[0] and isinstance(found, dict):
            return found
    return None


def speed_of(status: Mapping[str, Any]) -> float | None:
    """A node's speed: tokens per second over its models, None while it knows none."""
    known = [model["tokens_per_s"] for model in status.get("models", []) if model.get("tokens_per_s")]
    return sum(known) / len(known) if known else None


async def ask_servers(socket: Path) -> list[Server]:
    """Every server that HAProxy knows. Raises OSError, TimeoutError."""
    return read_servers(await ask_haproxy(socket, "show servers state"))


async def survey(socket: Path, token: str | None) -> list[tuple[Server, dict[str, Any] | None]]:
    """Every server that HAProxy knows, with what it says of itself. Raises OSError, TimeoutError."""
    servers = await ask_servers(socket)
    answers = await asyncio.gather(*(ask_status(server.host, server.port, token) for server in servers))
    return list(zip(servers, answers, strict=True))


async def balance(socket: Path, token: str | None) -> None:
    """Set the weights once. Raises OSError, TimeoutError."""
    found = [(server, speed_of(status)) for server, status in await survey(socket, token) if status is not None]
    wanted = weights({server.path: speed for server, speed in found if speed})
    for server, _ in found:
        if wanted.get(server.path, server.weight) != server.weight:
            await ask_haproxy(socket, f"set server {server.path} weight {wanted[server.path]}")


async def keep_balanced(socket: Path, token: str | None) -> None:
    """Set the weights again and again, until cancelled."""
    while True:
        with contextlib.suppress(OSError, TimeoutError):  # HAProxy is being started, or restarted
            await balance(socket, token)
        await asyncio.sleep(PERIOD_S)


class Hanging:
    """Servers that are down, and may still have requests of HAProxy's that they will not answer.

    HAProxy would wait for them until the server's timeout. Told to close them, it sends them to another server, but
    drops those that are only being connected; these are over after ``CONNECT_S``, and a server that is down gets no
    more. (That is why ``on-marked-down shutdown-sessions`` does not do: it loses some.)
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._told: set[str] = set()

    def find(self, servers: Sequence[Server], now: float) -> list[str]:
        """``BACKEND/SERVER`` of those to give up on now, each once for every time that it goes down."""
        down = {server.path for server in servers if not server.up}
        self._since = {path: self._since.get(path, now) for path in down}
        self._told &= down
        found = [path for path, since in self._since.items() if now - since >= CONNECT_S and path not in self._told]
        self._told.update(found)
        return sorted(found)


class Slow:
    """Servers that answer, be it too slowly for HAProxy's checks: when all are down, HAProxy would refuse everything.

    Machines busy with other work as well are slow, not dead: they are used again, and not checked while they are slow.
    """

    def __init__(self, socket: Path, token: str | None) -> None:
        self._socket = socket
        self._token = token
        self._unchecked: set[str] = set()

    async def revive(self, servers: Sequence[Server]) -> list[Server]:
        """Those that are used again. Raises OSError, TimeoutError."""
        self._unchecked &= {server.path for server in servers}
        all_down = not any(server.up for server in servers)
        asked = [server for server in servers if all_down or server.path in self._unchecked]
        alive = []
        for server, seconds in zip(asked, await asyncio.gather(*map(self._seconds, asked)), strict=True):
            check = seconds is None or seconds < CHECK_S
            if check and server.path in self._unchecked:
                await ask_haproxy(self._socket, f"enable health {server.path}")
                self._unchecked.remove(server.path)
            elif not check:  # again and again: an HAProxy that was restarted checks all
                await ask_haproxy(self._socket, f"disable health {server.path}")
                self._unchecked.add(server.path)
            if seconds is not None:
                alive.append(server)
                if not server.up:
                    await ask_haproxy(self._socket, f"set server {server.path} health up")
        return alive

    async def _seconds(self, server: Server) -> float | None:
        """How long it takes to say something; None when it does not."""
        begin = time.monotonic()
        status = await ask_status(server.host, server.port, self._token)
        return None if status is None else time.monotonic() - begin


async def keep_giving_up(socket: Path, token: str | None) -> None:
    """Take from servers that hang what they have, until cancelled; but use those that are only slow if all are down."""
    hanging, slow = Hanging(), Slow(socket, token)
    while True:
        with contextlib.suppress(OSError, TimeoutError):  # HAProxy is being started, or restarted
            servers = await ask_servers(socket)
            alive = await slow.revive(servers)
            for path in hanging.find([server for server in servers if server not in alive], time.monotonic()):
                await ask_haproxy(socket, f"shutdown sessions server {path}")
        await asyncio.sleep(GIVE_UP_PERIOD_S)


def warnings(statuses: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What is odd about nodes by name: other versions than most, or less than half of the work done natively."""
    found = []
    versions = [str(status.get("version")) for _, status in statuses]
    usual = max(set(versions), key=versions.count, default="")
    for (name, status), version in zip(statuses, versions, strict=True):
        if version != usual:
            found.append(f"{name} runs version {version}, the others {usual}; give all machines the same")
        for model in status.get("models", []):
            if model["native_layers"] < model["layers"] / 2:
                found.append(f"{name}: most of {model['name']} does not run natively; see espalier inspect")
    return found
