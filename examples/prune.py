"""Prune all-MiniLM-L6-v2 and heal it by distillation, on text alone: the compressed model of the demo.

    espalier compress MODEL --task embeddings --data passages.txt --eval-data pairs.csv --recipe ... -o OUT

is the same thing from the command line. Nobody has labelled the text; what the dense model says about it is the truth
to come close to, and the only thing that recovery can be measured against here.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import espalier
from espalier.compression import Config
from espalier.compression.compress import Data

HELD_OUT = 5
"""One text in five is not trained on, and judges the result."""
RECIPE = {
    "pattern": "4x1",
    "score": "sparsegpt",
    "calibration": {"batches": 8, "sequential": False, "step": 1.0},
    "recovery": {"task": 0.0, "logits": 0.0, "hidden": 1.0, "embeddings": 2.0},
    "training": {
        "learning_rate": 1e-3,
        "warmup": 0.05,
        "batch_tokens": 1024,
        "max_length": 128,
        "checkpoint_every": 0,
        "minutes": 2.0,
    },
}


def compress(
    model: Path, texts: Sequence[str], embeddings: np.ndarray, work: Path, *, sparsity: float, steps: int
) -> tuple[Path, float]:
    """Make a compressed copy of ``model`` in ``work`` and return its folder and recovery, 0 to 1.

    Training ends after ``steps``, or sooner on a machine that is too slow for the recipe's minutes.
    ``embeddings``: of ``texts[::HELD_OUT]`` by the dense model, of length one. Recovery is Spearman's correlation of
    the two models' similarities over pairs of those texts, which are not trained on. A copy that an earlier call made
    with the same settings is used again.
    """
    recipe = {**RECIPE, "sparsity": sparsity, "training": {**RECIPE["training"], "steps": steps}}
    config = Config.from_dict(recipe)
    folder, report = work / "minilm-compressed", work / "minilm-compressed" / "report.json"
    if report.is_file():
        found = json.loads(report.read_text(encoding="utf-8"))
        if found["config"] == config.to_dict():
            return folder, float(found["recovered"])
    shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    training, judging = work / "passages.txt", work / "pairs.csv"
    training.write_text("".join(f"{t}\n" for i, t in enumerate(texts) if i % HELD_OUT), encoding="utf-8")
    write_pairs(judging, texts[::HELD_OUT], embeddings)
    done = espalier.compress(
        model, config, task="embeddings", data=Data(training=(training,), evaluation=judging), output=folder
    )
    return folder, float(done.recovered or 0.0)


def write_pairs(path: Path, texts: Sequence[str], embeddings: np.ndarray) -> None:
    """Each text with the one most like it and with another one, scored by the dense model."""
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -1)
    other = np.random.default_rng(0).permutation(len(texts))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence1", "sentence2", "score"])
        for partners in (similar.argmax(axis=1), other):
            rows.writerows((texts[i], texts[j], float(embeddings[i] @ embeddings[j])) for i, j in enumerate(partners))
