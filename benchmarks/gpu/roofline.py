"""How much work an operation is, and how long the ceilings say that it takes at least."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier.compiler.packed import PackedBatch
from espalier.gpu import instructions as ops
from espalier.gpu.form import Form
from espalier.gpu.program import GpuProgram

FALLBACK = {"bf16": 800.0, "fp8": 1600.0, "gb_per_s": 3500.0}
"""Rough figures of an H100 or H200, in TFLOP/s and GB/s, used only where ceilings.py has not run; rows say so."""


@dataclass(frozen=True)
class Ceilings:
    """Matrix rates in TFLOP/s by type, bandwidth in GB/s, and whether they were measured here."""

    rates: dict[str, float]
    gb_per_s: float
    measured: bool

    @classmethod
    def read(cls, path: Path) -> Ceilings:
        """What ceilings.py wrote."""
        try:
            rows = json.loads(path.read_text())["rows"]
            rates = {kind: rows[f"{kind}/square"]["tflops"] for kind in ("bf16", "fp8")}
            return cls(rates, rows["bandwidth"]["gb_per_s"], True)
        except (OSError, KeyError, ValueError):
            return cls({kind: FALLBACK[kind] for kind in ("bf16", "fp8")}, FALLBACK["gb_per_s"], False)

    def seconds(self, work: Work) -> float:
        """The least time: whichever of the two ceilings is lower."""
        return max(work.operations / (self.rates[work.type] * 1e12), work.bytes / (self.gb_per_s * 1e9))


@dataclass
class Work:
    """Operations of the matrix units, in ``type``, and bytes that must pass through memory."""

    operations: float
    bytes: float
    type: str = "bf16"


def work_of(program: GpuProgram, instruction: ops.Instruction, batch: PackedBatch) -> Work:
    """The work of one instruction on a batch, with every value read and written once."""
    tokens = batch.tokens
    wide = instruction.form.dtype.itemsize

    def written(width: int, form: Form) -> float:
        return tokens * width * ((wide if form.keep else 0) + (1 if form.scale is not None else 0))

    if isinstance(instruction, ops.Gemm):
        weight = program.weights[instruction.weight]
        rows, depth = weight.values.shape  # type: ignore[attr-defined]
        size = 1 if weight.reads_fp8 else wide
        kind = "fp8" if weight.reads_fp8 else "bf16"
        moved = size * (tokens * depth + rows * depth) + written(rows, instruction.form)
        return Work(2.0 * tokens * rows * depth, moved, kind)
    if isinstance(instruction, ops.Attend):
        maker = {i.out: i for i in program.instructions}[instruction.v]
        width = maker.stop - maker.start if isinstance(maker, ops.SliceFeatures) else 0
        squares = float(np.square(batch.lengths.astype(np.float64)).sum())
        return Work(4.0 * squares * width, 3 * tokens * width * wide + written(width, instruction.form))
    if isinstance(instruction, ops.Norm):
        width = program.tables[instruction.gamma].numel()
        reads = 2 if instruction.residual else 1
        return Work(0.0, reads * tokens * width * wide + written(width, instruction.form))
    if isinstance(instruction, ops.Embed):
        width = program.tables[instruction.tables[0][0]].shape[1]
        return Work(0.0, len(instruction.tables) * tokens * width * wide + written(width, instruction.form))
    return Work(0.0, 0.0)


def table(program: GpuProgram, batch: PackedBatch, ceilings: Ceilings) -> dict[str, Any]:
    """Measured and least seconds by kind of operation, and the share of the roofline that each kind reaches."""
    measured = program.measure(batch)
    spent: dict[str, float] = defaultdict(float)
    least: dict[str, float] = defaultdict(float)
    for instruction, row in zip(program.instructions, measured, strict=True):
        spent[instruction.op] += row.seconds
        least[instruction.op] += ceilings.seconds(work_of(program, instruction, batch))
    return {
        "ceilings_measured": ceilings.measured,
        "least_seconds": sum(least.values()),
        "operations": {
            op: {"seconds": spent[op], "least": least[op], "share": least[op] / spent[op] if spent[op] else None}
            for op in spent
        },
    }
