"""What the harness costs: Offline under LoadGen beside the engine by itself, and an empty engine's queries per second.

    python benchmarks/mlperf/harness.py MODEL --data SQUAD -o benchmarks/mlperf/results/harness.json

MODEL is a folder with its tokenizer, SQUAD the folder of the dev set. Runs are short (`--seconds`) and conform to no
rules. Both sides of Offline get samples of the same data set in random order and batches of the same budget of tokens;
the engine by itself is `run_ragged` in a loop, as `espalier benchmark` runs it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine
from ragged import Row, full_batches, rate

import espalier
from espalier.data import Tokens, read_squad
from espalier.data.question_answering import cut_pieces
from espalier.mlperf.report.rows import value_of
from espalier.mlperf.results import read_system, write_json
from espalier.pipelines import QuestionAnswering

SQUAD = "dev-v1.1.rebuilt.json"
NOOP_QPS = 50_000


def batches_of(model: Path, pipeline: QuestionAnswering, data: Path, seed: int) -> list[list[Row]]:
    """The whole data set in random order, in full batches."""
    pieces = [piece.feature for piece in cut_pieces(Tokens.read(model, 384), read_squad(data))]
    return full_batches(pipeline.row(pieces[i]) for i in np.random.default_rng(seed).permutation(len(pieces)))


def under_loadgen(options: argparse.Namespace, name: str, *more: str) -> dict[str, Any]:
    """One performance run by the command that a user would type: its metric, and why it does not count."""
    with tempfile.TemporaryDirectory(prefix="espalier-harness-") as folder:
        command = [sys.executable, "-m", "espalier", "mlperf", "run", str(options.model), "--data", str(options.data)]
        command += ["-o", folder, "--name", name, "--mode", "performance", "--threads", str(options.threads)]
        command += ["--quick", str(options.seconds), *more]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        system = read_system(Path(folder, name))
    step = system.step(more[more.index("--scenario") + 1], "performance")
    if step is None:
        return {"value": None, "problems": ["the run did not end"]}
    return {"value": value_of(step), "valid": step.valid, "problems": step.problems}


def offline(options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of both, and the median of the rounds' ratios."""
    session = espalier.load(options.model, threads=options.threads, tune=False)
    pipeline = QuestionAnswering(session, None)
    outputs = list(pipeline.outputs)
    batches = batches_of(options.model, pipeline, options.data / SQUAD, options.seed)
    session.run_ragged(outputs, batches[0])
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        alone = rate(session, outputs, batches, options.seconds)
        found = under_loadgen(options, f"offline-{number}", "--scenario", "Offline", "--no-tune")
        rounds.append({"engine": alone, "loadgen": found["value"], "problems": found["problems"]})
        print(rounds[-1], flush=True)
    good = [one["loadgen"] / one["engine"] for one in rounds if one["loadgen"] and not one["problems"]]
    return {"rounds": rounds, "of_engine": statistics.median(good) if good else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder of SQuAD's dev set")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=20, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    busy = machine.busy()
    noop = ("--engine", "noop", "--scenario", "Server", "--qps", str(NOOP_QPS))
    results = {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "command": shlex.join(["python", "benchmarks/mlperf/harness.py", *sys.argv[1:]]),
        "seed": options.seed,
        "busy_before": busy,
        "noop": [under_loadgen(options, f"noop-{number}", *noop) for number in range(options.rounds)],
    }
    print(results["noop"], flush=True)
    results["offline"] = offline(options)
    write_json(options.output, results)
    print(f"Offline is {results['offline']['of_engine']} of the engine's own throughput")
    return 0


if __name__ == "__main__":
    sys.exit(main())
