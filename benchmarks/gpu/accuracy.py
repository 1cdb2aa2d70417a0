"""What bf16 and FP8 cost on real text: scores beside float32's, and whether answers repeat to the bit.

    python benchmarks/gpu/accuracy.py

all-MiniLM-L6-v2 on the STS benchmark's test part (Spearman), and any question answering model folder given with
`--qa FOLDER` on SQuAD (F1). FP8 is calibrated on training sentences, never on what is scored. Runs on
`--device torch-cpu` too, slowly: FP8's rounding is the same there, only sums are taken in another order.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import SEED, Run, graph_named, lengths_of, program_of, rows_of
from models import minilm_folder

import espalier
from espalier.data import Tokens, read_squad, read_table
from espalier.data.question_answering import cut_pieces
from espalier.mlperf.library import Library, PairsLibrary, SquadLibrary


def calibration_texts(run: Run, library: type[Library], tokens: Tokens, count: int) -> list[list[int]]:
    """Token ids of training data."""
    if library is PairsLibrary:
        table = read_table(run.options.data / "stsb" / "stsb-en-train.csv")
        texts = table.texts(table.columns[0])[:count]
        return [ids.tolist() for ids, _ in tokens.encode(texts)]
    questions = read_squad(run.options.data / "squad" / "train-v1.1.rebuilt.json")
    chosen = [questions[i] for i in np.random.default_rng(SEED).permutation(len(questions))[:count]]
    return [piece.feature.ids.tolist() for piece in cut_pieces(tokens, chosen)]


def score(run: Run, folder: Path, library: type[Library], data: Path, precision: str) -> dict[str, Any]:
    """The metric of one precision over the whole data set, 64 sequences at a time."""
    tokens = Tokens.read(folder, library.max_length)
    found = library.read(data, tokens)
    calibration: Path | None = None
    with tempfile.TemporaryDirectory() as temporary:
        if precision == "fp8":
            texts = calibration_texts(run, library, tokens, 8 if run.smoke else 256)
            calibration = espalier.calibrate(
                folder, [texts], Path(temporary) / "scales.json", device=run.options.device
            )
        session = espalier.load(folder, device=run.options.device, precision=precision, calibration=calibration)
    pipeline = library.pipeline(session, None)
    order = np.argsort([-len(found.samples[n].ids) for n in range(len(found.samples))], kind="stable")
    order = order[-32:] if run.smoke else order
    answers: dict[int, np.ndarray] = {}
    for start in range(0, len(order), 64):
        numbers = order[start : start + 64].tolist()
        answers |= dict(zip(numbers, pipeline.run([found.samples[n] for n in numbers]), strict=True))
    accuracy = found.score(answers)
    types = [layer.type for layer in session.report().layers if layer.op == "Linear"]
    return {
        "data": found.title,
        "metric": accuracy.metric,
        "value": accuracy.value,
        **accuracy.details,
        "fp8_layers": types.count("fp8"),
        "other_layers": len(types) - types.count("fp8"),
        "device": run.options.device,
    }


def repeats(run: Run, precision: str) -> dict[str, Any]:
    """The same packing twice, bit for bit, and other packings of the same sequences within the tolerance."""
    graph = graph_named(run, "bert-base")
    program = program_of(run, graph, precision)
    rows = rows_of(lengths_of(run, 8 if run.smoke else 256), graph)
    (first,) = program.run_ragged(rows).values()
    (second,) = program.run_ragged(rows).values()
    same = all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    order = np.random.default_rng(SEED).permutation(len(first))
    shuffled = {name: [values[i] for i in order[: len(order) // 2]] for name, values in rows.items()}
    (other,) = program.run_ragged(shuffled).values()
    largest = max(float(np.abs(row).max()) for row in first)
    differences = [float(np.abs(first[i] - row).max()) for i, row in zip(order, other, strict=False)]
    tolerance = {"bf16": 0.05, "fp8": 0.2}[precision]
    error = max(differences) / max(1.0, largest)
    return {"agrees": same and error <= tolerance, "bitwise": same, "other_packing": error, "tolerance": tolerance}


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    folder = given.pop(given.index("--qa") + 1) if "--qa" in given else None
    run = Run("accuracy", __doc__, [word for word in given if word != "--qa"])
    for precision in ("bf16", "fp8"):
        run.row(f"repeats/{precision}", partial(repeats, run, precision))
    pairs, squad = run.options.data / "stsb" / "stsb-en-test.csv", run.options.data / "squad" / "dev-v1.1.rebuilt.json"
    for precision in ("fp32", "bf16", "fp8"):
        if pairs.exists():
            run.row(f"minilm/stsb/{precision}", partial(score, run, minilm_folder(), PairsLibrary, pairs, precision))
        if folder is not None and squad.exists():
            run.row(f"qa/squad/{precision}", partial(score, run, Path(folder), SquadLibrary, squad, precision))
    for task in ("minilm/stsb", "qa/squad"):
        values = {p: run.rows.get(f"{task}/{p}", {}).get("value") for p in ("fp32", "bf16", "fp8")}
        if values["fp32"]:
            shares = {p: f"{v / values['fp32']:.2%}" for p, v in values.items() if v is not None}
            print(f"{task}: share of float32's score: {shares}")
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
