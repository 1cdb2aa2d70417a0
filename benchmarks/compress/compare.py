"""Is second-order pruning with distillation worth it? The same zeros in the same budget, made in simpler ways.

    python benchmarks/compress/compare.py MODEL --data ../shared/data --work build/compress/compare

A sentence encoder is fine-tuned for SST-2 (two classes), then pruned to 90 % zeros in 4x1 blocks by every method with
every seed, over the same number of epochs. Resumable: a run whose report is there is not repeated. Writes
results/comparison.json and results/comparison.md. Figures are accuracies on the test part; settings were chosen on the
development part, which is what `--part dev` judges on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import espalier
from espalier.compression import Config
from espalier.compression.compress import Data
from espalier.doctor import machine

RESULTS = Path(__file__).resolve().parent / "results"
LABELS = {"task": 1.0, "logits": 0.0, "hidden": 0.0, "embeddings": 0.0}
TEACHER = {"task": 0.5, "logits": 1.0, "hidden": 1.0, "embeddings": 0.0}
ONE_PASS = {"batches": 16, "sequential": False, "step": 1.0}
ONE_SHOT = {"kind": "oneshot"}
GRADUAL = {"kind": "gradual", "steps": 5, "first": 0.6, "end": 0.4, "rewind": False}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude, one shot, fine-tuning": {"score": "magnitude", "schedule": ONE_SHOT, "recovery": LABELS},
    "magnitude, gradual, fine-tuning": {"score": "magnitude", "schedule": GRADUAL, "recovery": LABELS},
    "magnitude, gradual, distillation": {"score": "magnitude", "schedule": GRADUAL, "recovery": TEACHER},
    "SparseGPT, gradual, distillation": {"score": "sparsegpt", "schedule": GRADUAL, "recovery": TEACHER},
    "oBERT, gradual, distillation": {"score": "obert", "schedule": GRADUAL, "recovery": TEACHER},
}
"""Between neighbouring rows one thing changes, so that the table says what each is worth."""


def convert(data: Path, part: str, work: Path) -> Path:
    """SST-2 as a table of labels and sentences."""
    lines = (data / "sst2" / f"stsa.binary.{part}").read_text(encoding="utf-8").splitlines()
    rows = [line.partition(" ")[::2] for line in lines]
    path = work / f"sst2-{part}.jsonl"
    path.write_text("".join(json.dumps({"label": a, "sentence": b}) + "\n" for a, b in rows), encoding="utf-8")
    return path


def training(epochs: float, rate: float) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "learning_rate": rate,
        "batch_tokens": 1024,
        "max_length": 64,
        "precision": "bfloat16",
        "checkpoint_every": 0,
    }


def run(model: Path, settings: dict[str, Any], data: Data, output: Path) -> dict[str, Any]:
    """The report of a run, which is made unless it is there."""
    report = output / "report.json"
    if not report.is_file():
        config = Config.from_dict(settings)
        espalier.compress(model, config, task="classification", data=data, output=output, measure=False)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    data = Data(
        training=(convert(arguments.data, "train", work),), evaluation=convert(arguments.data, arguments.part, work)
    )
    common: dict[str, Any] = {"threads": arguments.threads}
    dense = work / "dense"
    settings = {**common, "recovery": LABELS, "training": training(3, 2e-4)}
    yield "dense", 0, run(arguments.model, settings, data, dense)
    for seed in arguments.seeds:
        for method, chosen in METHODS.items():
            settings = {**common, **chosen, "seed": seed, "sparsity": arguments.sparsity, "pattern": "4x1"}
            # Fisher matrices take a backward pass each, which a CPU does for fewer batches in the same time.
            batches = 8 if chosen["score"] == "obert" else ONE_PASS["batches"]
            settings |= {"calibration": {**ONE_PASS, "batches": batches}, "training": training(arguments.epochs, 6e-4)}
            name = f"{method.replace(', ', '-').replace(' ', '-').lower()}-{arguments.part}-{seed}"
            yield method, seed, run(dense, settings, data, work / name)


def row(method: str, found: dict[int, dict[str, Any]], dense: float) -> str:
    values = [report["compressed"]["value"] for report in found.values()]
    mean, spread = statistics.mean(values), max(values) - min(values)
    minutes = statistics.mean(report["history"]["seconds"] for report in found.values()) / 60
    each = " ".join(f"{value:.4f}" for value in values)
    return f"| {method} | {each} | {mean:.4f} | {spread:.4f} | {mean / dense:.1%} | {minutes:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/compress/compare"))
    parser.add_argument("--part", default="test", choices=["dev", "test"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    reports: dict[str, dict[int, dict[str, Any]]] = {}
    for method, seed, report in runs(arguments):
        reports.setdefault(method, {})[seed] = report
    dense = reports.pop("dense")[0]["compressed"]["value"]
    lines = [
        f"SST-2, {arguments.part} part, {arguments.sparsity:.0%} zeros in 4x1 blocks, {arguments.epochs:g} epochs, "
        f"{arguments.threads} threads; dense: {dense:.4f}.",
        "",
        f"| method | accuracy with seeds {', '.join(map(str, arguments.seeds))} | mean | range | of dense | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
        *(row(method, found, dense) for method, found in reports.items()),
    ]
    if arguments.part == "test":
        (RESULTS / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        values = {m: {str(s): r["compressed"] for s, r in found.items()} for m, found in reports.items()}
        options = {name: str(value) for name, value in vars(arguments).items() if name not in ("work", "model", "data")}
        content = {"machine": machine(), "options": options, "dense": dense, "methods": values}
        (RESULTS / "comparison.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
