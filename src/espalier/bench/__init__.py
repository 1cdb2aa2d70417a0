"""Measuring a model here, beside a peer: outputs are compared first, then both are timed in turn."""

from __future__ import annotations

from espalier.bench.agreement import Agreement, compare
from espalier.bench.feeds import Feeds, InputLimits, limits_of, make_feeds, read_arrays, read_feeds
from espalier.bench.run import PEERS, BenchmarkResult, Candidate, Settings, benchmark
from espalier.bench.timing import Timing, interleaved

__all__ = [
    "PEERS",
    "Agreement",
    "BenchmarkResult",
    "Candidate",
    "Feeds",
    "InputLimits",
    "Settings",
    "Timing",
    "benchmark",
    "compare",
    "interleaved",
    "limits_of",
    "make_feeds",
    "read_arrays",
    "read_feeds",
]
