"""What nodes do together beside what they do alone: Offline, Server under a bound on the 99th percentile, utilisation.

sudo python benchmarks/cluster/throughput.py -o benchmarks/cluster/results/throughput.json

Four nodes are network namespaces on this machine, their engines timed stand-ins (standin.py), so that the figures are
about everything between a client and an engine: HAProxy, Ray Serve, the replica's scheduler. Alone, every node has an
entry whose HAProxy sends to it only, all four at once, so that the machine is as busy as it is together. Stages that
are in the file already are not repeated; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
import machine
from client import Client
from load import Tally, open_loop, run_all
from namespaces import HTTP, Cluster, check_tools
from simulate import lengths

MIXES = {"1:1:1:1": (1, 1, 1, 1), "1:1:2:4": (1, 1, 2, 4)}
BOUND_TOKENS = 1040
"""The bound on latency is the time of so many tokens on the slowest node: MLPerf's 130 ms at 8,000 tokens a second."""
AHEAD_S = 2.0
"""Offline a node has so many seconds of work under way."""
BARS = {"offline": 0.97, "server": 0.95, "utilisation": 0.10, "two": 1.95}


@dataclass
class Group:
    """Nodes that answer together at one entry. ``speed``: their tokens per second."""

    nodes: Sequence[int]
    speed: float
    client: Client

    def busy(self) -> list[float]:
        """Seconds that the nodes have worked."""
        return [self.client.busy.get(node, 0.0) for node in self.nodes]


@dataclass
class Search:
    """The highest rate that keeps the bound, by bisection; ``unit`` is the rate that the tokens alone allow."""

    unit: float
    low: float = 0.0
    high: float = 1.0
    best: dict[str, Any] | None = None

    @property
    def rate(self) -> float:
        """To try next."""
        return self.unit * (self.low + self.high) / 2

    def learn(self, found: dict[str, Any], *, kept: bool) -> None:
        """What came of :attr:`rate`."""
        if kept:
            self.low, self.best = (self.low + self.high) / 2, {**found, "rate": self.rate}
        else:
            self.high = (self.low + self.high) / 2


def alike(seed: int) -> np.ndarray:
    """Tokens of sequences, SQuAD's quantiles in random order: any stretch of requests is about the same work."""
    return np.random.default_rng(seed).permutation(np.sort(lengths(6100, seed))[50::100])


def spread(shares: Sequence[float]) -> float:
    """By how much the least busy falls short of the busiest, relative to it."""
    return 1 - min(shares) / max(shares)


def keeps(tally: Tally, bound: float) -> bool:
    """Whether all were answered, 99 % of them within the bound. The first tenth of the answers is not looked at."""
    later = Tally(tally.answers[len(tally.answers) // 10 :])
    return set(tally.codes()) == {200} and bool(np.percentile(later.seconds(), 99) <= bound)


class Bench:
    """The stages, and the file they are kept in."""

    def __init__(self, arguments: argparse.Namespace, cluster: Cluster) -> None:
        self.unit, self.seconds, self.out = arguments.unit, arguments.seconds, arguments.output
        self.bound = BOUND_TOKENS / self.unit
        self.cluster = cluster
        self.tokens = alike(arguments.seed)
        self.seed = arguments.seed
        self.steps = arguments.steps
        self.found: dict[str, Any] = {"stages": {}}
        if self.out.exists() and not arguments.fresh:
            self.found = json.loads(self.out.read_text())

    def stage(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage that is not there yet, and keep it."""
        stages = self.found["stages"]
        if name not in stages:
            stages[name] = {**run(), "load_average": os.getloadavg()[0]}
            print(name, json.dumps(stages[name]), flush=True)
            self.save()
        return stages[name]

    def save(self) -> None:
        """Write what was found."""
        self.found.update(
            engine="a timed stand-in: it sleeps for as long as its tokens take at the speed stated",
            nodes="network namespaces on one machine",
            unit_tokens_per_s=self.unit, bound_s=self.bound, seconds=self.seconds, seed=self.seed,
            machine=machine.describe(), versions=machine.versions(), commit=machine.commit(),
            command=" ".join(["python", "benchmarks/cluster/throughput.py", *sys.argv[1:]]),
        )  # fmt: skip
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def has(self, scenario: str) -> bool:
        """Whether every stage of a scenario is there."""
        return all(f"{mix} {scenario}" in self.found["stages"] for mix in MIXES)

    def scenario(self, scenario: str) -> None:
        """All stages of a scenario."""
        work = {"server": self.server, "offline": self.offline}[scenario]
        every = self.cluster.nodes
        for mix, parts in MIXES.items():
            speeds = [self.unit * part for part in parts]
            for node, speed in zip(self.cluster.nodes, speeds, strict=True):
                self.cluster.set_speed(node, speed)
            name = f"{mix} {scenario}"
            alone = self.stage(f"{name} alone", lambda s=speeds: self.run([[node] for node in every], s, work))
            whole = self.stage(name, lambda s=speeds: self.run([every], s, work))
            self.judge(name, scenario, whole, alone)
            if scenario == "offline" and len(set(parts)) == 1:
                two = self.stage(f"1:1 {scenario}", lambda s=speeds: self.run([every[:2]], s, work))
                one = alone["groups"][0]["per_s"]
                self.verdict("two nodes against one", two["groups"][0]["per_s"] / one, BARS["two"])

    def run(
        self, groups: Sequence[Sequence[int]], speeds: Sequence[float], scenario: Callable[[list[Group]], Any]
    ) -> dict[str, Any]:
        """Let each group's first node send to the group alone, warm up, and run a scenario on all groups at once."""
        for nodes in groups:
            self.cluster.only(nodes[0], nodes)

        async def work() -> list[dict[str, Any]]:
            found = [
                Group(nodes, sum(speeds[node - 1] for node in nodes),
                      Client([self.cluster.address(nodes[0])], HTTP, self.tokens, self.seed))
                for nodes in groups
            ]  # fmt: skip
            await asyncio.gather(*(self.all_of(group, 10.0) for group in found))
            results = await scenario(found)
            for group in found:
                await group.client.close()
            return results

        return {"groups": asyncio.run(work())}

    async def offline(self, groups: list[Group]) -> list[dict[str, Any]]:
        """Everything there is, as fast as it goes."""
        return await asyncio.gather(*(self.all_of(group, self.seconds) for group in groups))

    async def server(self, groups: list[Group]) -> list[dict[str, Any]]:
        """The highest Poisson rate whose 99th percentile keeps the bound."""
        searches = [Search(group.speed / self.tokens.mean()) for group in groups]
        for step in range(self.steps):
            await asyncio.gather(*(self.try_rate(g, s, step) for g, s in zip(groups, searches, strict=True)))
        return [search.best or {"rate": 0.0} for search in searches]

    async def all_of(self, group: Group, seconds: float) -> dict[str, Any]:
        """As many sequences as the group should need ``seconds`` for. Raises SystemExit when one is lost."""
        per_s = group.speed / self.tokens.mean()
        before = group.busy()
        ahead = max(4 * len(group.nodes), round(AHEAD_S * per_s))
        tally, took = await run_all(group.client.send, round(per_s * seconds), ahead)
        if set(tally.codes()) != {200}:
            raise SystemExit(f"not all were answered: {tally.codes()}")
        found = len(tally.answers) / took
        return {"nodes": list(group.nodes), "per_s": found, "of_speed": found / per_s, "seconds": took,
                "utilisation": self.utilisation(group, before, took)}  # fmt: skip

    async def try_rate(self, group: Group, search: Search, step: int) -> None:
        """One step of a search."""
        before = group.busy()
        tally, took = await open_loop(group.client.send, search.rate, self.seconds, self.seed + step)
        found = {
            **tally.summary(took),
            "nodes": list(group.nodes),
            "utilisation": self.utilisation(group, before, took),
        }
        print(f"  {search.rate:.2f}/s at {list(group.nodes)}: {json.dumps(found)}", flush=True)
        search.learn(found, kept=keeps(tally, self.bound))

    @staticmethod
    def utilisation(group: Group, before: Sequence[float], took: float) -> list[float]:
        """Share of the time that each node worked."""
        return [round((now - then) / took, 3) for now, then in zip(group.busy(), before, strict=True)]

    def judge(self, name: str, scenario: str, together: dict[str, Any], alone: dict[str, Any]) -> None:
        """Hold what a mix did to the bars."""
        key = "per_s" if scenario == "offline" else "rate"
        (whole,) = together["groups"]
        self.verdict(f"{name}, of the sum", whole[key] / sum(one[key] for one in alone["groups"]), BARS[scenario])
        self.verdict(f"{name}, utilisation apart", spread(whole["utilisation"]), BARS["utilisation"], most=True)

    def verdict(self, name: str, value: float, bar: float, *, most: bool = False) -> None:
        """Keep and say a figure beside its bar."""
        met = bool(value <= bar if most else value >= bar)
        self.found.setdefault("bars", {})[name] = {"value": round(value, 4), "bar": bar, "met": met}
        print(f"{name}: {value:.3f}, bar {bar:g}: {'met' if met else 'MISSED'}", flush=True)
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--unit", type=float, default=1000.0, help="tokens per second of the slowest node")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--steps", type=int, default=5, help="of the search for a rate, each halving what is not known")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    check_tools()
    with Cluster(4) as cluster:
        bench = Bench(arguments, cluster)
        for node in cluster.nodes:
            cluster.set_speed(node, arguments.unit)
        for scenario, limits in (("server", {"latency": bench.bound}), ("offline", {})):
            if bench.has(scenario):
                continue
            cluster.serve(delay=600, **limits)
            for node in cluster.nodes:
                cluster.wait_ready(node, cluster.nodes)
            bench.scenario(scenario)


if __name__ == "__main__":
    main()
