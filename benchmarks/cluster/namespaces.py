"""A cluster of network namespaces on this machine, with stand-ins for engines: for what a cluster does, not how fast.

Needs root, iproute2, HAProxy, and Ray beside this interpreter. Everything binds inside the namespaces. They are taken
down at the end, also after an error, with every process in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from espalier._network import is_loopback
from espalier.cluster import balance, settings

BRIDGE, NET, PORT, HTTP = "esp0", "10.77.0", 6390, 8000
HERE = Path(__file__).resolve().parent
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_READY_S = 300.0
_TRIES = 4
_RAY_ADDRESS = Path("/tmp/ray/ray_current_cluster")


def shell(*command: str, check: bool = True) -> str:
    """Run a command and return what it said. Raises SystemExit with what it complained of."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def check_tools() -> None:
    """Raise SystemExit where namespaces or HAProxy cannot be had."""
    if os.geteuid() != 0 or not all(shutil.which(tool, path=PATH) for tool in ("ip", "haproxy")):
        raise SystemExit("this needs root, iproute2 and HAProxy")


def _patiently(attempt: Callable[[], Any], clean_up: Callable[[], None]) -> None:
    """On a busy machine Ray's own helpers may take longer than Ray waits for them: try again."""
    for left in reversed(range(_TRIES)):
        try:
            attempt()
            return
        except SystemExit:
            if not left:
                raise
            clean_up()


class Cluster:
    """Namespaces ``esp-1`` and so on, the first being the head, on one bridge; up between enter and exit.

    ``retry``: whether HAProxy sends again what a node leaves unanswered, as ours does. Without it is the control arm.
    """

    def __init__(self, nodes: int, *, retry: bool = True) -> None:
        self.nodes = list(range(1, nodes + 1))
        self.version = 1
        self._entry = [sys.executable, "-m", "espalier"] if retry else [sys.executable, str(HERE / "without_retry.py")]
        self._speeds = Path(tempfile.mkdtemp(prefix="espalier-speeds-"))

    def __enter__(self) -> Cluster:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        self._take_down()
        shutil.rmtree(settings.STATE, ignore_errors=True)
        try:
            self._connect()
            for node in self.nodes:
                self.start(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._take_down()
        shutil.rmtree(self._speeds, ignore_errors=True)

    @property
    def head(self) -> str:
        """The address to join at."""
        return f"{self.address(1)}:{PORT}"

    def address(self, node: int) -> str:
        """A node's own."""
        return f"{NET}.{10 + node}"

    def start(self, node: int) -> None:
        """A node joins, or the first one starts the cluster or returns to it."""
        # Ray's check whether it runs here already would find the other nodes' processes, which share this machine.
        _RAY_ADDRESS.unlink(missing_ok=True)
        head = ("start", "--host", self.address(1), "--port", str(PORT))
        other = ("join", self.head, "--host", self.address(node))
        _patiently(lambda: self.run(node, "cluster", *(head if node == 1 else other)), lambda: self.end(node))

    def run(self, node: int, *arguments: str) -> str:
        """``espalier`` on a node."""
        return self._inside(node, *self._entry, *arguments)

    def end(self, node: int) -> None:
        """Every process of a node is killed, and gone."""
        while shell("ip", "netns", "pids", f"esp-{node}", check=False).split():
            self.send_signal(node, signal.SIGKILL)
            time.sleep(0.05)

    def serve(self, **limits: float) -> None:
        """Put stand-ins on all nodes; another ``version`` replaces them node by node. ``limits``: the scheduler's."""
        given = [f"{name}={value}" for name, value in limits.items()]
        command = [sys.executable, str(HERE / "standin.py"), self.head, str(self._speeds), str(self.version), *given]
        _patiently(lambda: self._inside(1, *command), lambda: None)

    def set_speed(self, node: int, tokens_per_s: float) -> None:
        """How fast a node's stand-in is from now on."""
        path = self._speeds / self.address(node)
        path.with_suffix(".new").write_text(str(tokens_per_s))
        path.with_suffix(".new").replace(path)

    def send_signal(self, node: int, what: int) -> None:
        """To every process of a node."""
        for pid in shell("ip", "netns", "pids", f"esp-{node}", check=False).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), what)

    def link(self, node: int, state: str) -> None:
        """A node's cable: up or down. Nobody is told."""
        shell("ip", "link", "set", f"esp-v{node}", state)

    def survey(self, entry: int) -> dict[int, tuple[balance.Server, dict[str, Any] | None]]:
        """By node, the servers as a node's HAProxy sees them, and what they say of themselves."""

        async def ask() -> dict[int, tuple[balance.Server, dict[str, Any] | None]]:
            servers = balance.read_servers(await balance.ask_haproxy(self._socket(entry), "show servers state"))
            # An HAProxy reaches its own machine's by loopback, which from here is another.
            hosts = [self.address(entry) if is_loopback(server.host) else server.host for server in servers]
            said = await asyncio.gather(
                *(balance.ask_status(host, s.port, None) for host, s in zip(hosts, servers, strict=True))
            )
            numbers = (int(host.rpartition(".")[2]) - 10 for host in hosts)
            return dict(zip(numbers, zip(servers, said, strict=True), strict=True))

        return asyncio.run(ask())

    def only(self, entry: int, wanted: Sequence[int]) -> None:
        """Let a node's HAProxy send to the nodes wanted alone."""
        for node, (server, _) in self.survey(entry).items():
            state = "ready" if node in wanted else "maint"
            command = f"set server {server.backend}/{server.name} state {state}"
            asyncio.run(balance.ask_haproxy(self._socket(entry), command))

    def wait_ready(self, entry: int, nodes: Sequence[int]) -> float:
        """Wait until a node's HAProxy has exactly these nodes, all up; returns the seconds. Raises SystemExit."""
        begin = time.monotonic()
        seen: dict[int, bool] = {}
        while time.monotonic() < begin + _READY_S:
            with contextlib.suppress(OSError, TimeoutError):
                survey = self.survey(entry)
                seen = {node: server.up and said is not None for node, (server, said) in survey.items()}
                if seen == dict.fromkeys(nodes, True):
                    return time.monotonic() - begin
            time.sleep(1)
        raise SystemExit(f"after {_READY_S:g} s node {entry} should know {list(nodes)}, all up; it knows {seen}")

    def _inside(self, node: int, *command: str) -> str:
        return shell("ip", "netns", "exec", f"esp-{node}", "setsid", "--wait", *command)

    def _socket(self, node: int) -> Path:
        """Where a node's HAProxy takes commands. Raises ConnectionError when it is not there."""
        for pid in shell("ip", "netns", "pids", f"esp-{node}", check=False).split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "-f" in words and words[-3:] and Path(words[0]).name == "haproxy":
                    return Path(words[words.index("-f") + 1]).with_name(settings.SOCKET)
        raise ConnectionError(f"no HAProxy runs on node {node}")

    def _connect(self) -> None:
        shell("ip", "link", "add", BRIDGE, "type", "bridge")
        shell("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        shell("ip", "link", "set", BRIDGE, "up")
        for node in self.nodes:
            inside = ("ip", "-n", f"esp-{node}")
            shell("ip", "netns", "add", f"esp-{node}")
            shell("ip", "link", "add", f"esp-v{node}", "type", "veth", "peer", "name", "eth0", "netns", f"esp-{node}")
            shell("ip", "link", "set", f"esp-v{node}", "master", BRIDGE, "up")
            shell(*inside, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            shell(*inside, "link", "set", "eth0", "up")
            shell(*inside, "link", "set", "lo", "up")

    def _take_down(self) -> None:
        names = [name for name in shell("ip", "netns", "list").split() if name.startswith("esp-")]
        for name in names:
            self.end(int(name.removeprefix("esp-")))
            shell("ip", "netns", "del", name)
        for link in (BRIDGE, *(f"esp-v{node}" for node in self.nodes)):
            shell("ip", "link", "del", link, check=False)
