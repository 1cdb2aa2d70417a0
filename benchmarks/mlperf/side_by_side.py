"""Engines side by side under LoadGen: Offline and SingleStream on SQuAD's real lengths, each with its accuracy.

    python benchmarks/mlperf/side_by_side.py --qa QA --qa-int8 QA_INT8 --data SQUAD -o FOLDER
    python benchmarks/mlperf/side_by_side.py ... --accuracy        # afterwards; the machine need not be quiet for that

QA and QA_INT8 are folders by `espalier compress`; the BERT-base-shape models have random weights (`models.py`) and so
no accuracy. Runs are short (`--seconds`) and do not conform to MLPerf's rules: they compare, and are no submissions.
What is finished stays: repeat the command after an interruption. FOLDER gets LoadGen's logs by system, and
side-by-side.json and .md.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine
import models

from espalier.mlperf.report.rows import UNVERIFIED, value_of
from espalier.mlperf.report.text import QUICK
from espalier.mlperf.results import SYSTEM, read_system, write_json

SCENARIOS = ("Offline", "SingleStream")
MINILM, BASE = "MiniLM-QA", "BERT-base shape"


@dataclass(frozen=True)
class Row:
    """One engine with one model. ``model``: `qa`, `qa-int8` or one of models.py."""

    family: str
    model: str
    engine: str
    padding: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.engine, self.padding, self.model)))

    @property
    def baseline(self) -> bool:
        """Whether others are divided by it: the float model, dense where there is a choice, in ONNX Runtime."""
        return self.engine == "onnxruntime" and self.model in ("qa", "dense")


ROWS = (
    Row(MINILM, "qa", "espalier"),
    Row(MINILM, "qa-int8", "espalier"),
    Row(MINILM, "qa", "onnxruntime", "max"),
    Row(MINILM, "qa", "onnxruntime", "longest"),
    Row(MINILM, "qa-int8", "onnxruntime", "longest"),
    Row(MINILM, "qa", "openvino", "longest"),
    Row(MINILM, "qa-int8", "openvino", "longest"),
    Row(MINILM, "qa", "deepsparse", "max"),
    Row(MINILM, "qa-int8", "deepsparse", "max"),
    Row(BASE, "4x1-90", "espalier"),
    Row(BASE, "1x4-90-int8", "espalier"),
    Row(BASE, "dense", "espalier"),
    Row(BASE, "dense", "onnxruntime", "max"),
    Row(BASE, "dense", "onnxruntime", "longest"),
    Row(BASE, "dense-int8", "onnxruntime", "longest"),
    Row(BASE, "dense", "openvino", "longest"),
    Row(BASE, "dense-int8", "openvino", "longest"),
    Row(BASE, "4x1-90", "deepsparse", "max"),
    Row(BASE, "1x4-90-int8", "deepsparse", "max"),
)


def model_path(row: Row, options: argparse.Namespace) -> Path:
    """Where the row's model lies; builds those of models.py."""
    if row.family == MINILM:
        return Path(options.qa if row.model == "qa" else options.qa_int8)
    return models.build(models.variant(row.model))


def run(row: Row, scenario: str, mode: str, options: argparse.Namespace) -> bool:
    """One step by the command that a user would type. False when it does not count."""
    command: list[object] = [sys.executable, "-m", "espalier", "mlperf", "run", model_path(row, options)]
    command += ["--data", options.data, "-o", options.output, "--name", row.name, "--scenario", scenario]
    command += ["--mode", mode, "--engine", row.engine, "--threads", options.threads, "--quick", options.seconds]
    if row.padding:
        command += ["--padding", row.padding]
    if row.engine in ("openvino", "deepsparse"):
        command += ["--python", machine.PEERS]
    if row.family == BASE:
        command += ["--tokenizer", options.qa, "--note", "random weights"]
    words = [str(word) for word in command]
    print(f"== {row.name}, {scenario}, {mode}", flush=True)
    return subprocess.run(words, check=False).returncode == 0


def outcome(row: Row, folder: Path) -> dict[str, Any]:
    """What the row's folder says, as plain values."""
    entry: dict[str, Any] = {"family": row.family, "model": row.model, "engine": row.engine, "padding": row.padding}
    if not (folder / row.name / SYSTEM).is_file():
        return entry
    system = read_system(folder / row.name)
    entry["versions"] = system.about.get("versions")
    for scenario in SCENARIOS:
        performance, accuracy = system.step(scenario, "performance"), system.step(scenario, "accuracy")
        if performance is not None:
            entry[scenario] = {
                "value": value_of(performance) if performance.valid else None,
                "problems": performance.problems,
                "finished": performance.finished,
            }
        if accuracy is not None and accuracy.valid and row.family == MINILM:
            entry["f1"] = accuracy.figures["metric"]
    return entry


def value(entry: dict[str, Any], scenario: str) -> float | None:
    """Samples a second, or milliseconds within which nine of ten queries are answered."""
    found: float | None = entry.get(scenario, {}).get("value")
    return found


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown; the last columns are Offline against ONNX Runtime's float model of the same family."""
    lines = [
        f"> {UNVERIFIED} {QUICK}",
        "",
        "| model | engine | padding | Offline, samples/s | Stream, ms p90 | F1 | to ORT at 384 | to ORT by length |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    bases = {
        (row.family, row.padding): value(entry, "Offline")
        for row, entry in zip(ROWS, entries, strict=True)
        if row.baseline
    }
    for row, entry in zip(ROWS, entries, strict=True):
        offline, stream = value(entry, "Offline"), value(entry, "SingleStream")
        cells = [f"{row.family}, {row.model}", row.engine, row.padding or "none"]
        cells += ["-" if offline is None else f"{offline:.1f}", "-" if stream is None else f"{stream:.1f}"]
        cells.append(f"{entry['f1']:.2f}" if "f1" in entry else "")
        for padding in ("max", "longest"):
            base = bases.get((row.family, padding))
            cells.append(f"{offline / base:.2f}" if offline and base else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--qa", required=True, help="folder of the pruned model")
    parser.add_argument("--qa-int8", required=True, help="the same in 8 bits")
    parser.add_argument("--data", required=True, help="the folder of SQuAD's dev set")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a performance run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", action="store_true", help="the accuracy runs instead, of trained models alone")
    parser.add_argument("--only", action="append", default=[], help="rows of this name; may be repeated")
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.only or row.name in options.only]
    if options.accuracy:
        steps = [(row, "Offline", "accuracy") for row in chosen if row.family == MINILM]
    else:  # what is compared runs in turn
        steps = [(row, s, "performance") for family in (MINILM, BASE) for s in SCENARIOS for row in chosen
                 if row.family == family]  # fmt: skip
    failed = [f"{row.name}, {scenario}" for row, scenario, mode in steps if not run(row, scenario, mode, options)]
    entries = [outcome(row, options.output) for row in ROWS]
    about = {"machine": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
    command = shlex.join(["python", "benchmarks/mlperf/side_by_side.py", *sys.argv[1:]])
    write_json(options.output / "side-by-side.json", {**about, "command": command, "rows": entries})
    text = table(entries)
    (options.output / "side-by-side.md").write_text(text, encoding="utf-8")
    print(text)
    for name in failed:
        print(f"does not count: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
