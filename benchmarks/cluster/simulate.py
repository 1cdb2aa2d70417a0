"""A simulation of the router: policies, unequal machines, many machines. No engine is involved, and no clock.

python benchmarks/cluster/simulate.py -o benchmarks/cluster/results/router.json

A simulated node does what the scheduler does: it takes what waits, up to a budget of tokens, and is busy with it for a
fixed time and for its tokens over its speed. Lengths are SQuAD's, roughly: log-normal, 20 to 384 tokens.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

from espalier.cluster.routing import POLICIES, Node, Router

BATCH_S = 0.002
"""Fixed cost of a batch."""
BOUND_S = 0.13
"""MLPerf's bound for BERT: 99 % of the answers within 130 ms."""
POLICY_NAMES = tuple(POLICIES)


def lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of sequences."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.0, 0.42, count), 20, 384).astype(int)


@dataclass
class Machine:
    """A simulated node: ``speed`` is its real one."""

    speed: float
    budget: int
    queue: deque[tuple[float, int, Any]] = field(default_factory=deque)
    busy: bool = False
    worked: float = 0.0

    def begin(self) -> tuple[float, list[tuple[float, int, Any]]] | None:
        """Start on a batch: how long it takes, and what is in it. None when nothing waits."""
        batch, total = [], 0
        while self.queue and (not batch or total + self.queue[0][1] <= self.budget):
            batch.append(self.queue.popleft())
            total += batch[-1][1]
        self.busy = bool(batch)
        if not batch:
            return None
        seconds = BATCH_S + total / self.speed
        self.worked += seconds
        return seconds, batch


@dataclass
class Outcome:
    """Latencies of all answers, the time of the last, and each node's share of it at work."""

    latencies: np.ndarray
    end: float
    busy: list[float]


def simulate(
    arrivals: np.ndarray, tokens: np.ndarray, speeds: Sequence[float], policy: str, *,
    believed: Sequence[float] | None = None, routers: int = 1, window: float | None = None,
) -> Outcome:  # fmt: skip
    """Run everything to its end. ``believed``: the speeds that the routers begin with; each sees only its own work."""
    # A batch takes a quarter of the bound at most, as the scheduler sees to.
    machines = [Machine(speed, max(384, int(BOUND_S / 4 * speed))) for speed in speeds]
    views = [Router([Node(str(i), speed) for i, speed in enumerate(believed or speeds)], policy, window=window)
             for _ in range(routers)]  # fmt: skip
    kept: list[deque[tuple[float, int]]] = [deque() for _ in views]
    events: list[tuple[float, int, int, Any]] = []
    order = itertools.count()
    found: list[float] = []
    now = 0.0

    def start(place: int) -> None:
        begun = machines[place].begin()
        if begun is not None:
            heapq.heappush(events, (now + begun[0], next(order), place, begun[1]))

    def offer(view: int, arrived: float, count: int) -> bool:
        node = views[view].route(count, now)
        if node is None:
            return False
        place = int(node.name)
        machines[place].queue.append((arrived, count, (view, node)))
        if not machines[place].busy:
            start(place)
        return True

    upcoming = deque(zip(arrivals.tolist(), tokens.tolist(), itertools.cycle(range(routers))))
    while upcoming or events:
        if upcoming and (not events or upcoming[0][0] <= events[0][0]):
            arrived, count, view = upcoming.popleft()
            now = arrived
            if kept[view] or not offer(view, arrived, count):
                kept[view].append((arrived, count))
            continue
        now, _, place, batch = heapq.heappop(events)
        touched = set()
        for arrived, count, (view, node) in batch:
            found.append(now - arrived)
            node.answered(count, now)
            touched.add(view)
        for view in touched:
            while kept[view] and offer(view, *kept[view][0]):
                kept[view].popleft()
        start(place)
    return Outcome(np.array(found), now, [one.worked / now for one in machines])


def server_capacity(
    speeds: Sequence[float], policy: str, seconds: float = 30.0, **options: Any
) -> tuple[float, Outcome]:
    """The highest Poisson rate whose 99th percentile keeps the bound, by bisection to 1 %."""
    mean = lengths(10_000, 1).mean()
    low, high = 0.0, 1.05 * sum(speeds) / mean
    best: Outcome | None = None
    while best is None or high - low > 0.01 * high:
        rate = (low + high) / 2
        count = int(rate * seconds)
        arrivals = np.cumsum(np.random.default_rng(2).exponential(1 / rate, count))
        outcome = simulate(arrivals, lengths(count, 3), speeds, policy)
        if np.percentile(outcome.latencies[count // 10 :], 99) <= BOUND_S:
            low, best = rate, outcome
        else:
            high = rate
        if high < 0.01 * sum(speeds) / mean:
            raise RuntimeError("no rate keeps the bound")
    return low, best


def offline_efficiency(speeds: Sequence[float], *, window: float | None, error: float, count: int = 20_000) -> float:
    """Everything at once: throughput over the sum of what the nodes do alone. ``error``: of the speeds believed."""
    rng = np.random.default_rng(4)
    believed = [speed * (1 + error * float(rng.uniform(-1, 1))) for speed in speeds]
    tokens = lengths(count, 5)
    outcome = simulate(np.zeros(count), tokens, speeds, "least-work", believed=believed, window=window)
    alone = 0.0
    for speed in speeds:
        part = tokens[: max(200, int(count * speed / sum(speeds)))]
        alone += int(part.sum()) / simulate(np.zeros(len(part)), part, [speed], "least-work").end
    return int(tokens.sum()) / outcome.end / alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1000)
    arguments = parser.parse_args()
    unit = 8_000.0  # tokens a second of the slowest node
    mixes = {"1:1": [1, 1], "1:1:1:1": [1] * 4, "1:1:2:4": [1, 1, 2, 4], "1:1:8": [1, 1, 8]}
    server: list[dict[str, Any]] = []
    for mix, parts in mixes.items():
        speeds = [unit * part for part in parts]
        alone = sum(server_capacity([speed], "least-work")[0] for speed in speeds)
        for policy in POLICY_NAMES:
            rate, outcome = server_capacity(speeds, policy)
            server.append({"mix": mix, "policy": policy, "per_s": rate, "of_sum": rate / alone,
                           "busy": [round(share, 3) for share in outcome.busy]})  # fmt: skip
            print(json.dumps(server[-1]))
    offline = []
    for error in (0.0, 0.1, 0.5):
        for window in (None, 0.25):
            share = offline_efficiency([unit * part for part in mixes["1:1:2:4"]], window=window, error=error)
            offline.append({"mix": "1:1:2:4", "speeds_wrong_by": error, "window_s": window, "of_sum": share})
            print(json.dumps(offline[-1]))
    many = []
    speeds = [unit * (1, 1, 2, 4)[i % 4] for i in range(arguments.nodes)]
    one = sum(server_capacity([unit * part], "least-work")[0] for part in (1, 1, 2, 4)) * arguments.nodes / 4
    for routers, policy in itertools.product((1, 8), ("least-work", "weighted-connections", "power-of-two-work")):
        rate = 0.9 * one
        count = int(rate * 1.0)
        arrivals = np.cumsum(np.random.default_rng(6).exponential(1 / rate, count))
        outcome = simulate(arrivals, lengths(count, 7), speeds, policy, routers=routers)
        p99 = float(np.percentile(outcome.latencies, 99))
        many.append({"nodes": arguments.nodes, "routers": routers, "policy": policy, "load": 0.9, "per_s": rate,
                     "p99_ms": round(p99 * 1e3, 1)})  # fmt: skip
        print(json.dumps(many[-1]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"bound_ms": BOUND_S * 1e3, "batch_ms": BATCH_S * 1e3, "unit_tokens_per_s": unit, "server": server,
             "offline": offline, "many": many, "commit": machine.commit()}  # fmt: skip
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
