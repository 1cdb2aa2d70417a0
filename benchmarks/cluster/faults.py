"""A cluster of network namespaces on this machine, under load, while nodes die: what is lost, and how long it takes.

sudo python benchmarks/cluster/faults.py MODEL -o benchmarks/cluster/results/faults.json [--nodes 3] [--faults kill,...]

Needs root, iproute2, HAProxy, and Ray beside this interpreter. The nodes share this machine, so that speeds mean
nothing here; only answers are counted. Faults that are in the file already are not repeated; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

from espalier.cluster.settings import STATE

BRIDGE, NET, PORT, HTTP = "esp0", "10.77.0", 6390, 8000
ESPALIER = str(Path(sys.executable).parent / "espalier")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def shell(*command: str, check: bool = True, **options: Any) -> str:
    """Run a command and return what it said."""
    return subprocess.run(command, check=check, capture_output=True, text=True, **options).stdout


class Cluster:
    """Namespaces ``esp-1`` and so on, the first being the head, on one bridge."""

    def __init__(self, nodes: int, model: Path) -> None:
        self.nodes = list(range(1, nodes + 1))
        self._model = model

    def __enter__(self) -> Cluster:
        self.__exit__()
        shutil.rmtree(STATE, ignore_errors=True)
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
        self.run(1, "cluster", "start", "--host", self.address(1), "--port", str(PORT))
        for node in self.nodes[1:]:
            self.join(node)
        serve = ["serve", f"model={self._model}", "--no-tune", "--threads", "1", "--cluster", self.head]
        command = ["ip", "netns", "exec", "esp-1", ESPALIER, *serve, "--host", "0.0.0.0", "--insecure"]
        line = shell(*command, "--http", str(HTTP))
        if f"{len(self.nodes)} machines" not in line:
            raise SystemExit(f"the cluster did not start: {line}")
        print(line.strip())
        return self

    def __exit__(self, *_: object) -> None:
        for name in shell("ip", "netns", "list").split():
            if name.startswith("esp-"):
                self.kill(name)
                shell("ip", "netns", "del", name)
        for link in (BRIDGE, *(f"esp-v{node}" for node in self.nodes)):
            shell("ip", "link", "del", link, check=False)

    @property
    def head(self) -> str:
        """The address to join at."""
        return f"{self.address(1)}:{PORT}"

    def address(self, node: int) -> str:
        """A node's own."""
        return f"{NET}.{10 + node}"

    def run(self, node: int, *arguments: str) -> str:
        """``espalier`` on a node."""
        return shell("ip", "netns", "exec", f"esp-{node}", ESPALIER, *arguments)

    def join(self, node: int) -> None:
        """A node joins."""
        self.run(node, "cluster", "join", self.head, "--host", self.address(node))

    def send_signal(self, node: int, what: int) -> None:
        """To every process of a node."""
        self.kill(f"esp-{node}", what)

    def link(self, node: int, state: str) -> None:
        """A node's cable: up or down. Nobody is told."""
        shell("ip", "link", "set", f"esp-v{node}", state)

    @staticmethod
    def kill(name: str, what: int = signal.SIGKILL) -> None:
        """To every process of a namespace."""
        for pid in shell("ip", "netns", "pids", name).split():
            try:
                os.kill(int(pid), what)
            except ProcessLookupError:
                continue


class Load:
    """So many requests under way at any time, to one entry, with the time and outcome of each."""

    BODY = json.dumps({"model": "model", "input": [[101, 7592, 2088, 102] * 12], "encoding_format": "base64"})

    def __init__(self, host: str, concurrency: int = 8) -> None:
        self._host = host
        self._stop = threading.Event()
        self.answers: list[tuple[float, float, int]] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(concurrency)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        connection = http.client.HTTPConnection(self._host, HTTP, timeout=60)
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                connection.request("POST", "/v1/embeddings", self.BODY)
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            self.answers.append((begin, time.monotonic() - begin, status))

    def summary(self, since: float) -> dict[str, Any]:
        """What came of the requests answered after ``since``."""
        part = [row for row in self.answers if row[0] + row[1] >= since]
        times = np.array([row[1] for row in part])
        lost = [row[2] for row in part if row[2] not in (200, 429)]
        refused = sum(row[2] == 429 for row in part)  # the queue was full: said at once, and nothing was begun
        p50, p99 = np.percentile(times, (50, 99)).round(3).tolist()
        return {"requests": len(part), "lost": len(lost), "codes": sorted(set(lost)), "refused": refused,
                "p50_s": p50, "p99_s": p99, "worst_s": round(float(times.max()), 3)}  # fmt: skip


def faults(cluster: Cluster) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """By name: what goes wrong, and how it is put right again."""
    last = cluster.nodes[-1]
    return {
        "none": (lambda: None, lambda: None),
        "pause": (lambda: cluster.send_signal(last, signal.SIGSTOP), lambda: cluster.send_signal(last, signal.SIGCONT)),
        "cut": (lambda: cluster.link(last, "down"), lambda: cluster.link(last, "up")),
        "kill": (lambda: cluster.send_signal(last, signal.SIGKILL), lambda: cluster.join(last)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--faults", default="none,kill,pause,cut")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not all(shutil.which(tool, path=PATH) for tool in ("ip", "haproxy")):
        raise SystemExit("this needs root, iproute2 and HAProxy")
    found: dict[str, Any] = {"faults": {}}
    if arguments.output.exists() and not arguments.fresh:
        found = json.loads(arguments.output.read_text())
    wanted = [name for name in arguments.faults.split(",") if name not in found["faults"]]
    with Cluster(arguments.nodes, arguments.model.resolve()) as cluster:
        for name in wanted:
            wrong, right = faults(cluster)[name]
            with Load(cluster.address(1)) as load:
                time.sleep(3)
                since = time.monotonic()
                wrong()
                time.sleep(arguments.seconds)
            found["faults"][name] = load.summary(since)
            print(name, json.dumps(found["faults"][name]), flush=True)
            found.update(machine=machine.describe(), nodes=arguments.nodes, commit=machine.commit())
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            right()
            time.sleep(10)


if __name__ == "__main__":
    main()
