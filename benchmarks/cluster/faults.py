"""Nodes of a cluster die, hang or go while it is under load: what is lost, and how long it takes.

sudo python benchmarks/cluster/faults.py -o benchmarks/cluster/results/faults.json --repeats 10
sudo python benchmarks/cluster/faults.py -o benchmarks/cluster/results/faults.json --control --faults kill,cut,pause

The nodes are network namespaces on this machine, their engines timed stand-ins (standin.py); all else is real. So many
requests are under way at any time, several of them on the node that is hit. --control runs an HAProxy that sends
nothing again, and must lose some. Repeats that are in the file already are not repeated; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
import machine
from client import Client
from load import Tally
from namespaces import HTTP, Cluster, check_tools, shell

NODES, CONCURRENCY, SEED = 3, 9, 1
TOKENS, SPEED = (40, 50, 60), 600.0
"""Of a request, and tokens per second: three requests take a node about a quarter of a second."""
ENOUGH = 2
"""Requests that must be under way on the node when it is hit: a repeat with fewer does not count."""
SETTLE_S = 4.0
ANSWERED = (200, 429)
"""A full queue says so at once, and nothing was begun: it is no loss."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a node, and how it is put right again.

    ``node``: the one that is hit, None for all. ``hosts``: those that the client knows; it asks the first while that is
    there. ``watch``: seconds from the fault on. ``p99_s``, ``worst_s``: bars besides that nothing may be lost.
    ``control``: without retry this must lose something.
    """

    name: str
    inject: Callable[[Cluster], Any]
    heal: Callable[[Cluster], Any]
    node: int | None = NODES
    hosts: tuple[int, ...] = (1,)
    watch: float = 10.0
    p99_s: float | None = None
    worst_s: float | None = None
    control: bool = False
    needs: str | None = None


def _restart(node: int) -> Callable[[Cluster], None]:
    def heal(cluster: Cluster) -> None:
        cluster.end(node)
        cluster.link(node, "up")
        cluster.start(node)

    return heal


def _drop(cluster: Cluster) -> None:
    """5 % of what reaches the node; by nftables, because many kernels come without netem."""
    rules = "table inet loss { chain input { type filter hook input priority 0; numgen random mod 100 < 5 drop; }; }"
    shell("ip", "netns", "exec", f"esp-{NODES}", "nft", rules)


def _replace(cluster: Cluster) -> None:
    cluster.version += 1
    cluster.serve(delay=5)


def _drain(cluster: Cluster) -> None:
    cluster.run(1, "cluster", "drain", cluster.head, cluster.address(NODES))


_ENTRY = 2
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none", lambda _: None, lambda _: None, None),
        Fault("kill", lambda c: c.end(NODES), _restart(NODES), p99_s=1.0, control=True),
        Fault("cut", lambda c: c.link(NODES, "down"), _restart(NODES), worst_s=3.0, control=True),
        Fault("pause", lambda c: c.send_signal(NODES, signal.SIGSTOP), _restart(NODES), worst_s=3.0, control=True),
        Fault("slow", lambda c: c.set_speed(NODES, SPEED / 10), lambda c: c.set_speed(NODES, SPEED), watch=20.0),
        Fault("loss", _drop, lambda _: shell("ip", "netns", "exec", f"esp-{NODES}", "nft", "flush ruleset"),
              watch=20.0, needs="nft"),
        Fault("entry", lambda c: c.end(_ENTRY), _restart(_ENTRY), _ENTRY, (_ENTRY, NODES)),
        Fault("update", _replace, lambda _: None, None),
        Fault("drain", _drain, _restart(NODES), watch=30.0),
        Fault("head", lambda c: c.end(1), lambda c: c.start(1), 1, (_ENTRY,), watch=120.0),
    )
}  # fmt: skip


def summarise(tally: Tally, seconds: float) -> dict[str, Any]:
    """What came of the requests answered since the fault."""
    times, codes = tally.seconds(), tally.codes()
    if not len(times):
        raise SystemExit("nothing was answered, not even with an error: the load did not run")
    p50, p99 = np.percentile(times, (50, 99)).round(3).tolist()
    return {
        "requests": len(times),
        "lost": sum(count for status, count in codes.items() if status not in ANSWERED),
        "codes": {str(status): count for status, count in codes.items()},
        "p50_s": p50,
        "p99_s": p99,
        "worst_s": round(float(times.max()), 3),
        "watched_s": round(seconds, 1),
    }


def judge(fault: Fault, runs: Sequence[Mapping[str, Any]], *, retry: bool) -> dict[str, Any]:
    """All repeats of a fault beside its bars. Raises SystemExit when there is none to judge."""
    if not runs:
        raise SystemExit(f"{fault.name}: no repeat counts")
    lost = sum(run["lost"] for run in runs)
    worst = {key: max(run[key] for run in runs) for key in ("p99_s", "worst_s")}
    found = {
        "repeats": len(runs),
        "lost": lost,
        "median_p99_s": round(statistics.median(run["p99_s"] for run in runs), 3),
        **{f"largest_{key}": value for key, value in worst.items()},
    }
    if not retry:
        return {**found, "met": lost > 0} if fault.control else found
    bars = {key: bar for key, bar in (("p99_s", fault.p99_s), ("worst_s", fault.worst_s)) if bar is not None}
    return {
        **found,
        "bars": {"lost": 0, **bars},
        "met": not lost and all(worst[key] < bar for key, bar in bars.items()),
    }


async def under_load(client: Client, act: Callable[[], float]) -> tuple[Tally, float]:
    """Requests, while ``act`` runs; returns those answered since the time that it returns, and the seconds."""
    tally, stop = Tally(), asyncio.Event()
    numbers = iter(range(1 << 40))

    async def work() -> None:
        while not stop.is_set():
            await tally.run(client.send, next(numbers))

    tasks = [asyncio.create_task(work()) for _ in range(CONCURRENCY)]
    try:
        since = await asyncio.to_thread(act)
        seconds = time.perf_counter() - since
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    return tally.since(since), seconds


def run_once(cluster: Cluster, fault: Fault) -> dict[str, Any]:
    """One repeat, the cluster being whole before it and after it."""
    found: dict[str, Any] = {"load_average": os.getloadavg()[0]}

    def act() -> float:
        time.sleep(SETTLE_S)
        if fault.node is not None:
            _, said = cluster.survey(fault.hosts[0])[fault.node]
            found["in_flight"] = said["in_flight"] if said else 0
        since = time.perf_counter()
        fault.inject(cluster)
        time.sleep(max(0.0, since + fault.watch - time.perf_counter()))
        return since

    client = Client([cluster.address(node) for node in fault.hosts], HTTP, TOKENS * 99, SEED)
    tally, seconds = asyncio.run(under_load(client, act))
    found.update(summarise(tally, seconds))
    begin = time.monotonic()
    fault.heal(cluster)
    cluster.wait_ready(1, cluster.nodes)
    return {**found, "whole_again_s": round(time.monotonic() - begin, 1)}


class Results:
    """The file: ``arms/ARM/FAULT`` holds the repeats, ``bars/ARM/FAULT`` what they come to."""

    def __init__(self, path: Path, *, fresh: bool, retry: bool) -> None:
        self._path = path
        self._retry = retry
        self._arm = "retry" if retry else "no retry"
        self._found: dict[str, Any] = {}
        if path.exists() and not fresh:
            self._found = json.loads(path.read_text())
        for part in ("arms", "bars", "skipped"):
            self._found.setdefault(part, {}).setdefault(self._arm, {})

    def runs(self, fault: Fault) -> list[dict[str, Any]]:
        """The repeats of a fault so far."""
        found: list[dict[str, Any]] = self._found["arms"][self._arm].setdefault(fault.name, [])
        return found

    def add(self, fault: Fault, run: dict[str, Any]) -> None:
        """Keep a repeat; one that hit nothing does not count."""
        print(fault.name, json.dumps(run), flush=True)
        if run.get("in_flight", ENOUGH) < ENOUGH:
            print(f"  does not count: fewer than {ENOUGH} requests were under way on the node", flush=True)
            return
        self.runs(fault).append(run)
        self._found["bars"][self._arm][fault.name] = judge(fault, self.runs(fault), retry=self._retry)
        self._save()

    def skip(self, fault: Fault, why: str) -> None:
        """Say why a fault is left out."""
        print(f"{fault.name}: skipped: {why}", flush=True)
        self._found["skipped"][self._arm][fault.name] = why
        self._save()

    def _save(self) -> None:
        self._found.update(
            engine="a timed stand-in: it sleeps for as long as its tokens take at the speed stated",
            nodes=f"{NODES} network namespaces on one machine", tokens=TOKENS, tokens_per_s=SPEED,
            concurrency=CONCURRENCY, seed=SEED, machine=machine.describe(), versions=machine.versions(),
            commit=machine.commit(), command=" ".join(["python", "benchmarks/cluster/faults.py", *sys.argv[1:]]),
        )  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--faults", default=",".join(FAULTS), help="of: %(default)s")
    parser.add_argument("--control", action="store_true", help="without retry")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    check_tools()
    results = Results(arguments.output, fresh=arguments.fresh, retry=not arguments.control)
    wanted = []
    for fault in (FAULTS[name] for name in arguments.faults.split(",")):
        if fault.needs is not None and shutil.which(fault.needs) is None:
            results.skip(fault, f"{fault.needs} is not installed")
        elif len(results.runs(fault)) < arguments.repeats:
            wanted.append(fault)
    if not wanted:
        return
    with Cluster(NODES, retry=not arguments.control) as cluster:
        for node in cluster.nodes:
            cluster.set_speed(node, SPEED)
        cluster.serve(delay=5)
        cluster.wait_ready(1, cluster.nodes)
        for _ in range(2 * arguments.repeats):  # some may not count
            for fault in wanted:
                if len(results.runs(fault)) < arguments.repeats:
                    results.add(fault, run_once(cluster, fault))


if __name__ == "__main__":
    main()
