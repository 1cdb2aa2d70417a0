"""What a run must show before it counts. The official checker lets invalid runs pass; this does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.mlperf.benchmarks import Benchmark
from espalier.mlperf.loadgen import DetailLog
from espalier.mlperf.rounds import Seeds

MIN_DURATION_MS = 600_000
_AUDIT_NOTE = "Multiple conf files are used"
"""LoadGen says so in every audit; the checker lets it pass there."""


def worker_problems(report: Mapping[str, Any]) -> list[str]:
    """Why the process of a run spoils it."""
    found: list[str] = []
    if report.get("error"):
        found.append(str(report["error"]))
    if report.get("failed"):
        found.append(f"the engine failed on {report['failed']} samples, first with: {report['failures'][0]}")
    steps = report.get("clock_steps")
    if steps:
        found.append(
            f"the system's clock was moved by {', '.join(f'{step:+.2f} s' for step in steps)} during the run, and "
            "LoadGen measures with it"
        )
    return found


def performance_problems(log: DetailLog, *, audit: bool = False) -> list[str]:
    """Why LoadGen's own log says that a performance run does not count."""
    found = log_errors(log, audit=audit)
    if log["result_validity"] != "VALID":
        reason = " ".join(str(log["result_invalid_reason"] or "").split()) or log.early_stopping or "no reason given"
        found.append(f"LoadGen: Result is : {log['result_validity'] or 'missing'} ({reason})")
    return found


def log_errors(log: DetailLog, *, audit: bool = False) -> list[str]:
    """The errors that LoadGen logged."""
    return [f"LoadGen: {error}" for error in log.errors if not (audit and _AUDIT_NOTE in error)]


def deviations(log: DetailLog, benchmark: Benchmark, seeds: Seeds) -> list[str]:
    """Where a run keeps less than the rules of a full one demand, by the settings that LoadGen says it used."""
    found: list[str] = []
    duration = log["effective_min_duration_ms"]
    if duration is not None and duration < MIN_DURATION_MS:
        found.append(f"it had to last {duration / 1000:g} s, the rules demand {MIN_DURATION_MS // 1000} s")
    samples = benchmark.samples
    if samples is not None:
        loaded = log["effective_performance_sample_count"]
        if loaded is not None and loaded < samples:
            found.append(f"it used {loaded} samples, the rules demand {samples}")
        query = log["effective_samples_per_query"]
        if log.scenario == "Offline" and query is not None and query < samples:
            found.append(f"its query had {query} samples, the rules demand {samples}")
    if log.scenario == "Server":
        bound = log["effective_target_latency_ns"]
        if bound is not None and bound > benchmark.latency_ms * 1e6:
            found.append(f"its latency bound was {bound / 1e6:g} ms, the benchmark's is {benchmark.latency_ms:g} ms")
    for name, expected in seeds.items():
        if log[f"effective_{name}"] != expected:
            found.append(f"{name} was {log[f'effective_{name}']}, expected {expected}")
    return found
