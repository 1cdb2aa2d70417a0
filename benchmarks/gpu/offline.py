"""Throughput on SQuAD's real lengths, without padding: every model in every precision, beside what its roofline says.

    python benchmarks/gpu/offline.py

The prediction stands in the row before the measurement is made: samples a second if every operation reached its
ceiling. A row also has the share of the roofline by kind of operation, and the kernels that tuning chose.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import Any

from common import MODELS, Run, graph_named, lengths_of, program_of, rows_of
from roofline import Ceilings, table

from espalier.gpu.batches import split
from espalier.gpu.program import Limits

PRECISIONS = ("bf16", "fp8")


def measure(run: Run, name: str, precision: str, tokens: int) -> dict[str, Any]:
    """Samples per second, the median of three passes over the same sequences."""
    graph = graph_named(run, name)
    program = program_of(run, graph, precision, Limits(tokens=tokens))
    count = 16 if run.smoke else 10_833
    lengths = lengths_of(run, count)
    rows = rows_of(lengths, graph)
    first = split(lengths, tokens=tokens, sequences=1024)[0]
    batch = program.pack_ragged({key: [value[i] for i in first] for key, value in rows.items()})
    ceilings = Ceilings.read(run.options.results.with_name("ceilings.json"))
    roofline = table(program, batch, ceilings)
    begin = time.perf_counter()
    program.run_ragged(rows)  # captures every graph
    warm_up = time.perf_counter() - begin
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        program.run_ragged(rows)
        seconds.append(time.perf_counter() - begin)
    choices = getattr(program.kernels, "choices", None)
    return {
        "predicted_samples_per_s": len(first) / roofline["least_seconds"],
        "samples_per_s": count / statistics.median(seconds),
        "tokens_per_s": sum(lengths) / statistics.median(seconds),
        "mean_length": sum(lengths) / count,
        "seconds": seconds,
        "warm_up_seconds": warm_up,
        "budget_tokens": tokens,
        "roofline": roofline,
        "chosen": sorted({f"{key[:2]}: {way}" for key, way in choices.chosen.items()}) if choices else [],
    }


def main(arguments: list[str] | None = None) -> int:
    run = Run("offline", __doc__, arguments)
    for name in MODELS:
        for precision in PRECISIONS:
            run.row(f"{name}/{precision}", partial(measure, run, name, precision, 128 if run.smoke else 16384))
    for tokens in () if run.smoke else (8192, 32768):  # how much the budget matters
        run.row(f"bert-large/fp8/{tokens}", partial(measure, run, "bert-large", "fp8", tokens))
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
