"""How many queries a second arrive at random and are still answered within 130 ms, 99 of 100 of them.

    python benchmarks/gpu/server.py

Poisson arrivals, one sequence each, through the same scheduler as the server and MLPerf's SUT. Rates go up in steps of
the model's offline rate (`offline.json`); the row holds the highest one that met the bound.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from common import Run, graph_named, lengths_of, program_of, rows_of

from espalier.gpu.program import GpuProgram, Limits
from espalier.scheduler import Item, Scheduler
from espalier.scheduler import Limits as Budget

BOUND = 0.130
LANES = 3


class Trial:
    """One rate: ``rate`` arrivals a second for ``seconds``. ``latencies`` in seconds."""

    def __init__(self, program: GpuProgram, rows: dict[str, list[np.ndarray]]) -> None:
        self.program = program
        self.rows = rows
        self.latencies: list[float] = []
        self._done = threading.Condition()

    def run(self, _model: Any, numbers: list[int]) -> Sequence[Any]:
        """A batch."""
        feeds = {name: [values[n] for n in numbers] for name, values in self.rows.items()}
        (answers,) = self.program.run_ragged(feeds).values()
        return answers

    def finish(self, items: list[Item], results: Sequence[Any]) -> None:
        """Note when each was answered."""
        now = time.monotonic()
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            raise failed[0]
        with self._done:
            self.latencies += [now - item.tag for item in items]
            self._done.notify()

    def measure(self, rate: float, seconds: float) -> dict[str, Any]:
        """The 99th percentile of the latency, from the time a query was due."""
        self.latencies = []
        budget = Budget(tokens=self.program.limits.tokens, waiting=None, latency=BOUND)
        scheduler = Scheduler(self.run, self.finish, budget, workers=LANES, lanes=LANES)
        random = np.random.default_rng(int(rate))
        due = time.monotonic() + np.cumsum(random.exponential(1 / rate, max(1, int(rate * seconds))))
        lengths = [len(row) for row in self.rows["input_ids"]]
        for n, at in enumerate(due):
            time.sleep(max(0.0, at - time.monotonic()))
            number = n % len(lengths)
            scheduler.submit(Item(number, lengths[number], float(at)))
        with self._done:
            self._done.wait_for(lambda: len(self.latencies) == len(due), timeout=seconds + 30)
        scheduler.close()
        p99 = float(np.percentile(self.latencies, 99)) if len(self.latencies) == len(due) else float("inf")
        return {"rate": rate, "p99_ms": p99 * 1e3, "answered": len(self.latencies)}


def highest(run: Run, name: str, precision: str) -> dict[str, Any]:
    """The highest rate within the bound, in steps of 5 % of the offline rate."""
    graph = graph_named(run, name)
    program = program_of(run, graph, precision, Limits(tokens=512 if run.smoke else 8192, lanes=LANES))
    rows = rows_of(lengths_of(run, 8 if run.smoke else 4096), graph)
    warm_up = program.warm_up([len(row) for row in rows["input_ids"][:64]])
    trial = Trial(program, rows)
    offline = 20.0 if run.smoke else offline_rate(run, f"{name}/{precision}")
    trials = []
    for share in (0.5,) if run.smoke else (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        trials.append(trial.measure(share * offline, 0.3 if run.smoke else 20.0))
        if trials[-1]["p99_ms"] > BOUND * 1e3:
            break
    met = [t["rate"] for t in trials if t["p99_ms"] <= BOUND * 1e3]
    best = max(met, default=0.0)
    return {"queries_per_s": best, "share_of_offline": best / offline, "warm_up_seconds": warm_up, "trials": trials}


def offline_rate(run: Run, row: str) -> float:
    """What offline.py measured."""
    path = run.options.results.with_name("offline.json")
    if not path.exists() or row not in json.loads(path.read_text())["rows"]:
        raise LookupError(f"{row} is not in {path} yet; run benchmarks/gpu/offline.py first")
    return float(json.loads(path.read_text())["rows"][row]["samples_per_s"])


def main(arguments: list[str] | None = None) -> int:
    run = Run("server", __doc__, arguments)
    for name in ("bert-large", "bert-base", "minilm"):
        for precision in ("fp8", "bf16"):
            run.row(f"{name}/{precision}", partial(highest, run, name, precision))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
