"""The compliance tests: that performance runs give the accuracy run's answers (TEST01), whatever the seeds (TEST05)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from espalier.errors import InputError
from espalier.mlperf.benchmarks import Benchmark
from espalier.mlperf.library import Library, sha256
from espalier.mlperf.loadgen import ACCURACY, DETAIL, DetailLog, complete_answers, read_answers

TOLERANCE = 0.10
"""How far the metric of a test may be from that of the run it tests."""


@dataclass(frozen=True)
class Audit:
    """A test: LoadGen's audit.config for it, and whether it uses the round's other seeds."""

    name: str
    config: str = ""
    alternative_seeds: bool = False
    compares_answers: bool = False


AUDITS = {
    audit.name: audit
    for audit in (
        Audit(
            "TEST01",
            config=(
                "*.*.mode = 2\n"
                "*.*.accuracy_log_rng_seed = 720381539243781796\n"
                "*.*.accuracy_log_sampling_target = 4096\n"
            ),
            compares_answers=True,
        ),
        Audit("TEST05", alternative_seeds=True),
    )
}


def find_audit(name: str) -> Audit:
    """The test of that name. Raises InputError."""
    if name not in AUDITS:
        raise InputError(f"unknown compliance test {name!r}; known: {', '.join(AUDITS)}")
    return AUDITS[name]


def verify(audit: Audit, base: Path, out: Path, library: Library, benchmark: Benchmark) -> list[str]:
    """Compare a test's run in ``out`` with the runs in ``base``; writes verify_*.txt. Returns what fails."""
    problems = _verify_performance(base / "performance", out)
    if audit.compares_answers:
        problems += _verify_accuracy(base / "accuracy", out, library, benchmark)
    return problems


def _verify_performance(base: Path, out: Path) -> list[str]:
    before, after = DetailLog(base / DETAIL).metric, DetailLog(out / DETAIL).metric
    good = bool(before and after and abs(after / before - 1) <= TOLERANCE)
    lines = [f"Reference score = {before}", f"Test score = {after}", "TEST PASS" if good else "TEST FAIL"]
    (out / "verify_performance.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [] if good else [f"the test's score is {after}, the run's {before}; the rules allow 10 % between them"]


def _verify_accuracy(base: Path, out: Path, library: Library, benchmark: Benchmark) -> list[str]:
    """Answers must be the same bit for bit; where they are not, the rules compare the metric on the same samples."""
    reference = complete_answers(base / ACCURACY, len(library.samples))
    answers = {sample: np.frombuffer(data, np.float32) for sample, data in read_answers(out / ACCURACY)}
    different = sum(not np.array_equal(answer, reference[sample]) for sample, answer in answers.items())
    same = bool(answers) and not different
    lines = [
        f"num_acc_log_entries = {len(reference)}",
        f"num_perf_log_entries = {len(answers)}",
        f"num_perf_log_data_mismatch = {different}",
        "TEST PASS" if same else "TEST FAIL",
    ]
    (out / "verify_accuracy.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = library.score(answers)
    hashed = f"{found.line}\nhash={sha256(out / ACCURACY)}\n"
    (out / "accuracy.txt").write_text(hashed, encoding="utf-8")
    if same:
        return []
    baseline = library.score({sample: reference[sample] for sample in answers})
    (out / "baseline_accuracy.txt").write_text(baseline.line + "\n", encoding="utf-8")
    (out / "compliance_accuracy.txt").write_text(found.line + "\n", encoding="utf-8")
    allowed = 1 - (benchmark.share or 0.99)
    if found.value and abs(1 - baseline.value / found.value) <= allowed:
        return []
    return [
        f"{different} of {len(answers)} answers differ from the accuracy run's, and {found.metric} on them is "
        f"{found.value:.3f} against {baseline.value:.3f}; the rules allow {allowed:.1%} between them"
    ]
