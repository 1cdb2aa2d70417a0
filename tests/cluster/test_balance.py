"""Weights by measured speed, against an HAProxy and nodes made up for the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from espalier.cluster import balance, settings
from espalier.errors import MissingDependencyError

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
HEADER = (
    "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight "
    "srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state srv_agent_state "
    "bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr "
    "srv_agent_addr srv_agent_port\n"
)
LINE = "5 http-espalier {n} {name} 127.0.0.1 {state} 0 {weight} 1 12 15 3 3 6 0 0 0 - {port} - 0 0 - - 0\n"


def state(*rows: tuple[str, int, int, int]) -> str:
    lines = [
        LINE.format(n=n, name=name, port=port, weight=w, state=up) for n, (name, port, w, up) in enumerate(rows, 1)
    ]
    return HEADER + "".join(lines) + "\n"


def test_haproxys_table_is_read() -> None:
    text = state(
        ("SERVE_REPLICA_a", 30000, 7, 2), ("SERVE_PROXY_ACTOR-fallback-x", 8500, 1, 2), ("SERVE_REPLICA_b", 1, 1, 0)
    )
    assert balance.read_servers(text) == [
        balance.Server("http-espalier", "SERVE_REPLICA_a", "127.0.0.1", 30000, 7, True),
        balance.Server("http-espalier", "SERVE_REPLICA_b", "127.0.0.1", 1, 1, False),
    ]
    for noise in ("", "\n", "Unknown command", HEADER, "# be_id\n1 2"):
        assert balance.read_servers(noise) == []


def test_weights_are_in_proportion() -> None:
    assert balance.weights({"a": 4000, "b": 2000, "c": 1000, "d": 1}) == {"a": 100, "b": 50, "c": 25, "d": 1}
    assert balance.weights({}) == {}
    assert balance.weights({"a": 0.0}) == {}


def test_the_speed_of_a_node_is_that_of_its_models() -> None:
    assert balance.speed_of({"models": [{"tokens_per_s": 10}, {"tokens_per_s": 30}, {"tokens_per_s": None}]}) == 20
    assert balance.speed_of({"models": []}) is None
    assert balance.speed_of({}) is None


def node(version: str, native: int) -> dict[str, Any]:
    return {"version": version, "models": [{"name": "m", "layers": 10, "native_layers": native, "tokens_per_s": 1}]}


def test_what_is_odd_is_said() -> None:
    found = balance.warnings([("a", node("1", 10)), ("b", node("1", 2)), ("c", node("2", 10))])
    assert len(found) == 2
    assert found[0].startswith("b: most of m does not run natively")
    assert found[1].startswith("c runs version 2, the others 1")


def test_weights_are_set(tmp_path: Path) -> None:
    """Two nodes that answer with their speeds, one that says nonsense, one that is not there."""
    commands: list[str] = []

    async def run() -> None:
        def status(speed: float) -> Any:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"authorization: Bearer secret" in head
                body = json.dumps({"models": [{"tokens_per_s": speed}]}) if speed else "nonsense"
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body.encode())
                writer.close()

            return answer

        servers = [await asyncio.start_server(status(speed), "127.0.0.1", 0) for speed in (100.0, 400.0, 0.0)]
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        text = state(*((f"SERVE_REPLICA_{i}", port, 1, 2) for i, port in enumerate([*ports, 1])))

        async def haproxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            command = (await reader.readline()).decode().strip()
            if command == "show servers state":
                writer.write(text.encode())
            else:
                commands.append(command)
            writer.close()

        proxy = await asyncio.start_unix_server(haproxy, str(tmp_path / "s"))
        await balance.balance(tmp_path / "s", "secret")
        for server in (*servers, proxy):
            server.close()

    asyncio.run(run())
    assert commands == [
        "set server http-espalier/SERVE_REPLICA_0 weight 25",
        "set server http-espalier/SERVE_REPLICA_1 weight 100",
    ]


def test_a_server_that_hangs_is_given_up_once_it_gets_no_more() -> None:
    def servers(*up: bool) -> list[balance.Server]:
        return [balance.Server("b", f"s{i}", "10.0.0.1", i, 1, alive) for i, alive in enumerate(up)]

    hanging, wait = balance.Hanging(), settings.CONNECT_S
    assert hanging.find(servers(True, False), 10.0) == []
    assert hanging.find(servers(True, False), 10.0 + wait / 2) == []  # some may still be being connected
    assert hanging.find(servers(True, False), 10.0 + wait) == ["b/s1"]
    assert hanging.find(servers(False, False), 20.0) == []  # told already; the other is down since now
    assert hanging.find(servers(True, True), 30.0) == []
    assert hanging.find(servers(False, False), 40.0) == []
    assert hanging.find(servers(False, False), 40.0 + wait) == ["b/s0", "b/s1"]


def test_haproxy_is_told_to_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    async def run() -> None:
        told = asyncio.Event()

        async def haproxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            command = (await reader.readline()).decode().strip()
            commands.append(command)
            if command.startswith("show"):
                writer.write(state(("SERVE_REPLICA_a", 1, 1, 2), ("SERVE_REPLICA_b", 2, 1, 0)).encode())
            else:
                told.set()
            writer.close()

        monkeypatch.setattr(balance, "CONNECT_S", 0.0)
        proxy = await asyncio.start_unix_server(haproxy, str(tmp_path / "s"))
        task = asyncio.create_task(balance.keep_giving_up(tmp_path / "s", None))
        await asyncio.wait_for(told.wait(), 10)
        task.cancel()
        proxy.close()

    asyncio.run(run())
    assert commands[:2] == ["show servers state", "shutdown sessions server http-espalier/SERVE_REPLICA_b"]


def test_when_all_are_down_those_that_answer_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is too slow for HAProxy's checks, one dead. The first is used, and checked again once it is fast."""
    monkeypatch.setattr(balance, "CHECK_S", 0.2)
    commands: list[str] = []

    async def run() -> None:
        wait, up = 0.0, 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(wait)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps({"models": []}).encode())
            writer.close()

        node = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = node.sockets[0].getsockname()[1]

        async def haproxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal up
            command = (await reader.readline()).decode().strip()
            commands.append(command)
            up = 2 if command.endswith("health up") else up
            writer.close()

        def servers() -> list[balance.Server]:
            return balance.read_servers(state(("SERVE_REPLICA_a", port, 1, up), ("SERVE_REPLICA_b", 1, 1, 0)))

        proxy = await asyncio.start_unix_server(haproxy, str(tmp_path / "s"))
        slow = balance.Slow(tmp_path / "s", None)
        for seconds, used in ((0.3, 1), (0.3, 1), (0.0, 1), (0.0, 0)):
            wait = seconds
            assert len(await slow.revive(servers())) == used
        for server in (node, proxy):
            server.close()

    asyncio.run(run())
    path = "http-espalier/SERVE_REPLICA_a"
    off, on, up = (f"{do} {path}" for do in ("disable health", "enable health", "set server"))
    assert commands == [off, f"{up} health up", off, on]


HAPROXY = """
global
    stats socket {socket} level admin
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 30s
frontend f
    bind 127.0.0.1:{port}
    default_backend b
backend b
    option httpchk GET /-/healthz
    default-server fall 2 rise 2 inter {check} fastinter {check} downinter {check} check
    server SERVE_REPLICA_a 127.0.0.1:{node}
"""


@pytest.mark.skipif(shutil.which("haproxy", path=PATH) is None, reason="needs HAProxy")
def test_a_slow_node_is_used_if_there_is_no_other(tmp_path: Path) -> None:
    """HAProxy itself, in front of a node that takes longer than its checks wait."""
    socket, config = tmp_path / "s", tmp_path / "haproxy.cfg"

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(settings.CHECK_S + 0.1)
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 14\r\nconnection: close\r\n\r\n{"models": []}')
        writer.close()

    async def ask(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        said = await reader.read()
        writer.close()
        return int(said[9:12])

    async def until(port: int, status: int) -> None:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    if await ask(port) == status:
                        return
                await asyncio.sleep(0.1)

    async def run() -> None:
        node = await asyncio.start_server(slow, "127.0.0.1", 0)
        free = await asyncio.start_server(slow, "127.0.0.1", 0)
        port = free.sockets[0].getsockname()[1]
        free.close()
        await free.wait_closed()
        check = f"{round(settings.CHECK_S * 1000)}ms"
        config.write_text(HAPROXY.format(socket=socket, port=port, check=check, node=node.sockets[0].getsockname()[1]))
        haproxy = await asyncio.create_subprocess_exec("haproxy", "-f", str(config), env={"PATH": PATH})
        try:
            await until(port, 503)
            task = asyncio.create_task(balance.keep_giving_up(socket, None))
            await until(port, 200)
            assert [await ask(port) for _ in range(5)] == [200] * 5
            task.cancel()
        finally:
            haproxy.terminate()
            await haproxy.wait()
            node.close()

    asyncio.run(run())


def test_settings_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(MissingDependencyError, match="HAProxy"):
        settings.environment("127.0.0.1")
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/sbin/haproxy")
    found = settings.environment("10.0.0.1")
    assert found["RAY_AUTH_MODE"] == "token"
    assert "response-timeout" in found["RAY_SERVE_HAPROXY_RETRY_ON"]
    assert int(found["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) > settings.BODY_BYTES
    # Ray adds a node's 56 letters to it, and a socket's path has 97 at most.
    assert len(found["RAY_SERVE_HAPROXY_SOCKET_PATH"]) + 57 < 97
