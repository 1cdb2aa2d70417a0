"""The report as Markdown and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from espalier.mlperf.report.rows import UNVERIFIED, Row, rows
from espalier.mlperf.results import System

_PACKAGES = frozenset(
    ("espalier", "loadgen", "numpy", "onnx", "onnxruntime", "openvino", "deepsparse", "python", "tokenizers")
)
"""What a result may depend on; everything else that is installed is in the JSON."""

QUICK = "Quick runs are shorter than the rules demand; their figures do not conform to MLPerf's rules."
ENERGY = "Energy is read from the counters of processor and GPU. It is not MLPerf power, which needs an approved meter."
NOT_MLPERF = "This benchmark is Espalier's own; MLPerf has none like it."


def as_dict(systems: Sequence[System]) -> dict[str, Any]:
    """Everything the report says."""
    return {
        "notice": UNVERIFIED,
        "systems": [
            {
                "name": system.name,
                "about": system.about,
                "rows": [asdict(row) for row in rows(system)],
                "steps": [asdict(step) for step in system.steps.values()],
            }
            for system in systems
        ],
    }


def notices(systems: Sequence[System]) -> list[str]:
    """What must be said beside the figures."""
    found = [UNVERIFIED]
    listed = [row for system in systems for row in rows(system)]
    if any(row.validity == "quick run" for row in listed):
        found.append(QUICK)
    if any(row.joules_per_sample is not None for row in listed):
        found.append(ENERGY)
    if not all(system.about["official"] for system in systems):
        found.append(NOT_MLPERF)
    return found


def facts(system: System) -> list[tuple[str, str]]:
    """A system in pairs of name and value: model, data, engine, machine, versions."""
    about, machine = system.about, system.about["machine"]
    identity, weights = about["identity"], about["weights"]
    settings = identity["settings"]
    zeros = weights.get("zeros")
    versions: dict[str, str] = dict(machine.get("versions", {}))
    accelerators: dict[str, None] = {}
    for step in system.steps.values():
        said = (machine["fields"] for machine in step.figures.get("machines") or [])
        accelerators |= {f["accelerator_model_name"]: None for f in said if f["accelerators_per_node"] != "0"}
        versions |= step.figures.get("versions") or {}
        if step.figures.get("loadgen"):
            versions["loadgen"] = str(step.figures["loadgen"])
    note = f"; {about['note']}" if about["note"] else ""
    return [
        ("benchmark", f"{about['title']}, {about['division']} division, {about['category']}"),
        ("rules", f"round {identity['round']}"),
        ("model", f"{about['model']} (SHA-256 {identity['model'][:16]}...){note}"),
        ("weights", "not known" if zeros is None else f"{zeros:.1%} zeros; {', '.join(weights['formats'])}"),
        ("data", f"{about['data']} (SHA-256 {identity['data'][:16]}...), {about['samples']} samples, "
                 f"{about['mean_tokens']} tokens on average"),
        ("engine", f"{identity['engine']}, {settings['threads']} threads, padding {settings['padding']}"
                   + (f", batches of {settings['batch']}" if settings["padding"] != "none" else "")),
        ("machine", f"{machine['cpu']}, {machine['cores_usable']} cores usable, {machine['isa'] or 'no engine'}"),
        *(("accelerator", name) for name in accelerators),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name in _PACKAGES)),
    ]  # fmt: skip


def cells(row: Row) -> list[str]:
    """The cells of a row, in the order of :data:`COLUMNS`."""
    joules = "" if row.joules_per_sample is None else f"{row.joules_per_sample:.3g}"
    return [row.system, row.scenario, f"{row.metric} (unverified)", row.unit, row.validity, row.accuracy, joules]


COLUMNS = ("system", "scenario", "metric", "unit", "validity", "accuracy", "J/query")


def as_markdown(systems: Sequence[System]) -> str:
    """The summary, the remarks, and the facts of every system."""
    lines = ["# MLPerf Inference results", "", *[f"> {text}" for text in notices(systems)], ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "| --- | --- | ---: | --- | --- | --- | ---: |"]
    listed = [row for system in systems for row in rows(system)]
    lines += [f"| {' | '.join(_cell(text) for text in cells(row))} |" for row in listed]
    for system in systems:
        lines += ["", f"## {system.name}", ""]
        lines += [f"- **{name}**: {value}" for name, value in facts(system)]
        for row in rows(system):
            lines += [f"- {row.scenario}: {text}" for text in explanations(row)]
    return "\n".join(lines) + "\n"


def explanations(row: Row) -> list[str]:
    """Sentences about one scenario: why it does not count or conform, and how sure it is."""
    found = list(row.remarks)
    if row.certainty:
        found.append(f"the rate lies {row.certainty}" if row.certainty.startswith("between") else row.certainty)
    if row.early_stopping:
        found.append(row.early_stopping)
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
