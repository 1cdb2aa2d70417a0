"""Throughput of a family of compressed models beside the dense one and ONNX Runtime, all in one run.

    python benchmarks/compress/throughput.py MODEL build/compress/embeddings-* --data ../shared/data --threads 2

MODEL is the dense folder of sentence embeddings, the others are what `espalier compress` made of it. All get the same
sequences in turn. Espalier takes them as they are; ONNX Runtime (float32, and int8 by its dynamic quantisation) gets
them sorted by length in batches, so that it computes next to no padding. ONNX Runtime's accuracy is Spearman's
correlation on the STS benchmark, as in the reports of the others. Writes results/throughput.json, from which
`collect.py` draws.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import espalier
from espalier import hf
from espalier.bench.timing import interleaved
from espalier.compression.export import session_inputs
from espalier.compression.measure import sample
from espalier.compression.tasks import Embeddings, Scores
from espalier.data import Feature, Tokens, collate, fixed_order
from espalier.data.metrics import spearman
from espalier.doctor import machine
from espalier.onnx.writer import write

HERE = Path(__file__).resolve().parent
BUDGET = 2048
OUTPUT = ["sentence_embedding"]


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(features: list[Feature], names: set[str]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    lengths = np.array([len(feature.ids) for feature in features])
    found = []
    for rows in fixed_order(lengths, BUDGET):
        batch = collate(features, rows)
        found.append((rows, {name: tensor.numpy() for name, tensor in batch.inputs.items() if name in names}))
    return found


def native(folder: Path, features: list[Feature], threads: int) -> Callable[[], Any]:
    """The folder in Espalier, on the sequences as they are."""
    loaded = espalier.load(folder, threads=threads)
    known = {info.name for info in loaded.get_inputs()}
    rows = [session_inputs(feature, known) for feature in features]
    return lambda: loaded.run_ragged(OUTPUT, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("compressed", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", default="test", choices=["dev", "test"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    task = Embeddings(Tokens.read(arguments.model, 128))
    pairs = arguments.data / "stsb" / f"stsb-en-{arguments.part}.csv"
    task.read_evaluation(pairs)
    features = task.evaluation_features()
    gold = np.array(task.table(pairs, ()).numbers("2"))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        write(hf.read(arguments.model), dense)
        quantize_dynamic(str(dense), str(small), weight_type=QuantType.QInt8)
        sessions = {"dense float32": session(dense, arguments.threads), "dense int8": session(small, arguments.threads)}
        names = {value.name for value in next(iter(sessions.values())).get_inputs()}
        chosen = sample(features, seed=arguments.seed)
        tokens = sum(len(feature.ids) for feature in chosen)
        timed = feeds(chosen, names)
        runs = {name: lambda s=s: [s.run(OUTPUT, feed) for _, feed in timed] for name, s in sessions.items()}
        runs |= {path.name: native(path, chosen, arguments.threads) for path in arguments.compressed}
        runs["dense"] = native(arguments.model, chosen, arguments.threads)
        timings = interleaved(runs, rounds=arguments.rounds, warmup=2)
        for name, runtime in sessions.items():
            vectors = np.zeros((len(features), 0), np.float32)
            for rows, feed in feeds(features, names):
                (part,) = runtime.run(OUTPUT, feed)
                vectors = vectors if vectors.shape[1] else np.zeros((len(features), part.shape[1]), np.float32)
                vectors[rows] = part
            cosine = (vectors[: len(gold)] * vectors[len(gold) :]).sum(1)
            scores = Scores("spearman", len(gold), lambda drawn, c=cosine: spearman(c[drawn], gold[drawn]))
            results.append(
                {
                    "name": f"ONNX Runtime, {name}",
                    "metric": scores.metric().to_dict(),
                    "tokens_per_s": tokens / timings[name].p50,
                }
            )
    found = {"machine": machine(), "threads": arguments.threads, "tokens": tokens, "part": arguments.part}
    found["espalier"] = {name: tokens / timings[name].p50 for name in runs if name not in sessions}
    target = HERE / "results" / "throughput.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found | {"results": results}, indent=2) + "\n", encoding="utf-8")
    for row in results:
        print(f"{row['name']}: {row['metric']['value']:.4f}, {row['tokens_per_s']:.0f} tokens/s")
    for name, speed in found["espalier"].items():
        print(f"Espalier, {name}: {speed:.0f} tokens/s")


if __name__ == "__main__":
    main()
