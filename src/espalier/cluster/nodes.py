"""``espalier cluster``: machines come and go. Everything is done by Ray's own command, with our settings."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier._network import is_loopback
from espalier.cluster import balance, settings
from espalier.errors import ConfigError, EngineError, MissingDependencyError

_START_S = 120


def start(host: str, port: int) -> str:
    """Make this machine the head of a new cluster; returns the address to join at. Raises EngineError, ConfigError."""
    address = _join(host, port)
    _new_token()
    head = ["--head", "--port", str(port), "--include-dashboard", "false"]
    _ray(["start", *head, "--no-monitor", *_node_options(host)], host)
    return address


def join(address: str, host: str | None, token: str | None) -> None:
    """Join a cluster. ``token``: as ``start`` said; None when this machine has it. Raises EngineError, ConfigError."""
    own = host or _own_address(address)
    if token is not None:
        _write_token(token)
    if not _token_file().is_file():
        raise ConfigError(f"the cluster's token is missing; put it into {_token_file()}, or give --token-file")
    _ray(["start", "--address", address, *_node_options(own)], own)


def leave() -> None:
    """Take this machine out of its cluster, or end the cluster when it is the head. Raises EngineError."""
    _ray(["stop"], "127.0.0.1")


def drain(address: str, node: str, seconds: int) -> None:
    """Let a node finish what it has and send nothing new there. Raises EngineError for a node that is not known."""
    known = {found["NodeManagerAddress"]: found["NodeID"] for found in members(address)}
    if node not in known:
        raise EngineError(f"there is no node {node}; there are: {', '.join(sorted(known)) or 'none'}")
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drained by espalier cluster drain"]
    deadline = ["--deadline-remaining-seconds", str(seconds)]
    _ray(["drain-node", "--address", address, "--node-id", known[node], *reason, *deadline], "127.0.0.1")


def members(address: str) -> list[dict[str, Any]]:
    """The machines that are up, as Ray describes them. Raises EngineError."""
    code = "import json, ray; ray.init('auto', logging_level='ERROR'); print(json.dumps(ray.nodes()))"
    done = _run([sys.executable, "-c", code], {**_environment("127.0.0.1"), "RAY_ADDRESS": address})
    found: list[dict[str, Any]] = json.loads(done.splitlines()[-1])
    return [node for node in found if node["Alive"]]


def status(address: str, token: str | None) -> dict[str, Any]:
    """Machines with their speeds, queues and versions, and what is odd about them. Raises EngineError."""
    up = {node["NodeID"]: node["NodeManagerAddress"] for node in members(address)}
    machines: dict[str, dict[str, Any]] = {name: {"address": name} for name in up.values()}
    sockets = {settings.HAPROXY / node / settings.SOCKET: name for node, name in up.items()}
    here = next((socket for socket in sockets if socket.exists()), None)  # any machine of the cluster has one
    if here is not None:
        for server, said in asyncio.run(balance.survey(here, token)):
            # HAProxy reaches its own machine's engine by loopback.
            name = sockets[here] if is_loopback(server.host) else server.host
            entry = machines.setdefault(name, {"address": name})
            entry.update(up=server.up, weight=server.weight, status=said)
    answers = [(name, entry["status"]) for name, entry in machines.items() if entry.get("status")]
    return {"nodes": list(machines.values()), "warnings": balance.warnings(answers)}


def _node_options(host: str) -> list[str]:
    own = ["--node-ip-address", host, "--resources", json.dumps({settings.RESOURCE: 1})]
    return [*own, "--include-log-monitor", "false", "--disable-usage-stats"]


def _ray(arguments: list[str], host: str) -> str:
    program = Path(sys.executable).parent / "ray"
    if not program.is_file():
        raise MissingDependencyError("a cluster needs Ray, which is not installed: pip install 'espalier[cluster]'")
    return _run([str(program), *arguments], _environment(host))


def _environment(host: str) -> dict[str, str]:
    return {**os.environ, **settings.environment(host)}


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_START_S, check=False)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise EngineError(f"{' '.join(command[:2])} failed: {words[-1] if words else 'it said nothing'}")
    return done.stdout


def _token_file() -> Path:
    return settings.state() / "token"


def _new_token() -> None:
    if not _token_file().is_file():
        _write_token(secrets.token_hex(24))


def _write_token(token: str) -> None:
    file = _token_file()
    file.touch(0o600)
    file.write_text(token, encoding="utf-8")


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_address(address: str) -> str:
    """The address by which this machine reaches the head."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is not the address of a cluster; expected HOST:PORT, as `cluster start` said")
    if is_loopback(host.strip("[]")):
        return host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host.strip("[]"), int(port)))
        except OSError as error:
            raise EngineError(f"{address} cannot be reached from here: {error.strerror or error}") from error
        return str(probe.getsockname()[0])
