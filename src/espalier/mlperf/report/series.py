"""What the plots show, taken from a system's files as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from espalier.mlperf.report.rows import value_of
from espalier.mlperf.results import System
from espalier.mlperf.worker import TIMES

_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """One line of a plot: ``x`` and ``y`` float64 ``[points]``."""

    label: str
    x: np.ndarray
    y: np.ndarray


def latency_cdf(system: System, scenario: str) -> Curve | None:
    """Milliseconds of queries (x) by the share of queries that took no longer (y)."""
    times = _times(system, scenario)
    if times is None or scenario == "Offline":
        return None
    share = np.linspace(0, 1, _POINTS)
    return Curve(system.name, np.quantile((times[:, 1] - times[:, 0]) * 1e3, share), share)


def throughput(system: System, scenario: str) -> Curve | None:
    """Seconds since the start (x), and samples answered per second then (y)."""
    times = _times(system, scenario)
    if times is None or scenario.endswith("Stream"):
        return None
    start, end = float(times[:, 0].min()), float(times[:, 1].max())
    bins = int(np.clip((end - start) / 2, 8, 120))
    counts, edges = np.histogram(times[:, 1], bins=bins, range=(start, end))
    widths = np.diff(edges)
    return Curve(system.name, edges[:-1] + widths / 2 - start, counts / widths)


def server_trials(system: System) -> tuple[Curve, np.ndarray] | None:
    """Rates tried (x) with the 99th percentile of latency in milliseconds (y), and which of them were sustained."""
    step = system.step("Server", "performance")
    search = step.figures.get("search") if step is not None else None
    if not search or not search.get("tails_ms"):
        return None
    order = np.argsort([rate for rate, _ in search["trials"]])
    rates = np.array([rate for rate, _ in search["trials"]], float)[order]
    tails = np.array([tail or np.nan for tail in search["tails_ms"]], float)[order]
    return Curve(system.name, rates, tails), np.array([good for _, good in search["trials"]], bool)[order]


def accuracy_and_speed(system: System) -> tuple[float, float] | None:
    """Offline samples per second and the metric of accuracy, None unless both count."""
    performance, accuracy = system.step("Offline", "performance"), system.step("Offline", "accuracy")
    if performance is None or accuracy is None or not performance.valid or not accuracy.valid:
        return None
    value = value_of(performance)
    return None if value is None else (value, float(accuracy.figures["metric"]))


def _times(system: System, scenario: str) -> np.ndarray | None:
    step = system.step(scenario, "performance")
    path: Path = system.folder / scenario / "performance" / TIMES
    if step is None or not step.valid or not path.is_file():
        return None
    times: np.ndarray = np.load(path, allow_pickle=False)
    return times if len(times) > 1 else None
