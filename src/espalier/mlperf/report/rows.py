"""What a report says, as plain values: one row per scenario of a system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from espalier.mlperf.results import Step, System

UNVERIFIED = "Result not verified by MLCommons Association."
UNITS = {"SingleStream": "ms, p90", "MultiStream": "ms, p99", "Server": "queries/s", "Offline": "samples/s"}


@dataclass(frozen=True)
class Row:
    """One scenario of one system, in words ready for a table; ``value`` is the metric in the scenario's unit."""

    system: str
    scenario: str
    value: float | None
    unit: str
    valid: bool
    conforming: bool
    validity: str
    accuracy: str
    accuracy_value: float | None
    remarks: list[str]
    early_stopping: str
    certainty: str
    joules_per_sample: float | None

    @property
    def metric(self) -> str:
        """The value with four significant digits, a dash where there is none."""
        return "-" if self.value is None else f"{self.value:,.4g}" if self.value < 1e4 else f"{self.value:,.0f}"


def rows(system: System) -> list[Row]:
    """Every scenario that has a performance or an accuracy step."""
    wanted = [s for s in system.scenarios if system.step(s, "performance") or system.step(s, "accuracy")]
    return [_row(system, scenario) for scenario in wanted]


def value_of(step: Step) -> float | None:
    """A performance step's metric: milliseconds for the streams, per second otherwise."""
    metric = step.figures.get("metric")
    if metric is None:
        return None
    return float(metric) / 1e6 if step.scenario.endswith("Stream") else float(metric)


def _row(system: System, scenario: str) -> Row:
    performance, accuracy = system.step(scenario, "performance"), system.step(scenario, "accuracy")
    steps = [step for step in (performance, accuracy) if step is not None]
    valid = performance is not None and performance.valid
    conforming = valid and accuracy is not None and all(step.conforming for step in steps)
    figures = performance.figures if performance is not None else {}
    return Row(
        system=system.name,
        scenario=scenario,
        value=value_of(performance) if performance is not None and valid else None,
        unit=UNITS[scenario],
        valid=valid,
        conforming=conforming,
        validity=_validity(performance, accuracy, conforming=conforming),
        accuracy=_accuracy(accuracy),
        accuracy_value=accuracy.figures["metric"] if accuracy is not None and accuracy.valid else None,
        remarks=[f"{step.name}: {text}" for step in steps for text in step.problems + step.deviations],
        early_stopping=str(figures.get("early_stopping") or ""),
        certainty=str((figures.get("search") or {}).get("certainty", "")),
        joules_per_sample=_joules(figures),
    )


def _validity(performance: Step | None, accuracy: Step | None, *, conforming: bool) -> str:
    if performance is None:
        return "not measured"
    if not performance.valid:
        return "does not count"
    if conforming:
        return "valid"
    if performance.deviations:
        return "quick run"
    return "accuracy missing" if accuracy is None or not accuracy.valid else "valid"


def _accuracy(step: Step | None) -> str:
    if step is None:
        return "not measured"
    if not step.valid:
        return "does not count"
    figures = step.figures
    target = figures.get("target")
    text = f"{figures['name']} {figures['metric']:.3f}"
    if target is None:
        return text
    share = figures["metric"] / figures["reference"]
    reached = "reaches" if figures["metric"] >= target else "below"
    return f"{text} ({share:.1%} of the reference, {reached} {target:.3f})"


def _joules(figures: dict[str, Any]) -> float | None:
    joules, seconds, metric = figures.get("joules"), figures.get("seconds"), figures.get("metric")
    if not joules or not seconds or not metric or "queries" not in figures:
        return None
    return None if not figures["queries"] else sum(joules.values()) / figures["queries"]
