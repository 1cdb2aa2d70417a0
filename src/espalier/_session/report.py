"""What a session runs where, and why."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from espalier._session.steps import AnyStep, NativeStep, OrtStep

FOREIGN = "ONNX Runtime"


@dataclass(frozen=True)
class LayerReport:
    """One layer. ``time_ms`` is a mean per run, summed over threads; None where it was not measured by itself.

    ``type`` is what a layer with a weight computes with: ``float32``, ``int8`` (one scale for all activations) or
    ``int8 per token``. ``count`` merges like foreign nodes into one row; ``sparsity`` is the share of weights that are
    zero. ``why`` says why a layer is foreign, or what the engine does otherwise than the model in a native one.
    """

    name: str
    op: str
    where: str
    type: str = ""
    format: str = ""
    sparsity: float | None = None
    time_ms: float | None = None
    count: int = 1
    why: str = ""


@dataclass(frozen=True)
class StepReport:
    """One step: a native segment or one for ONNX Runtime, with the mean time of its runs so far."""

    where: str
    calls: int
    time_ms: float | None
    exact_padding: bool
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True)
class Report:
    """The whole session. ``str(report)`` is a table.

    ``fallback_runs`` counts the runs that went to ONNX Runtime as a whole because of their input: a mask of other
    values than 0 and 1, or an empty input. No step counts them.
    """

    model: str
    threads: int
    steps: tuple[StepReport, ...]
    fallback_runs: int = 0

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Every layer in order."""
        return tuple(layer for step in self.steps for layer in step.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.model}, {self.threads} thread(s)", title_justify="left")
        for heading in ("layer", "op", "runs in", "type", "format"):
            table.add_column(heading, overflow="fold")
        table.add_column("zeros", justify="right")
        table.add_column("ms", justify="right")
        table.add_column("remark", overflow="fold")
        for step in self.steps:
            for layer in step.layers:
                name = layer.name if layer.count == 1 else f"{layer.name} (x{layer.count})".strip()
                zeros = "" if layer.sparsity is None else f"{layer.sparsity:.1%}"
                cells = (name, layer.op, layer.where, layer.type, layer.format, zeros, _ms(layer.time_ms), layer.why)
                table.add_row(*(_plain(cell) for cell in cells))
            label = f"step of {len(step.layers)} row(s), {step.calls} run(s)"
            table.add_row(label, "", step.where, "", "", "", _ms(step.time_ms), "", end_section=True, style="bold")
        stream = io.StringIO()
        console = Console(file=stream, width=140, color_system=None)
        console.print(table)
        if self.fallback_runs:
            console.print(
                f"{self.fallback_runs} run(s) went to ONNX Runtime as a whole because of their input: "
                "attention masks should hold only 0 and 1",
                soft_wrap=True,
            )
        return stream.getvalue()


def report_of(name: str, threads: int, steps: Sequence[AnyStep], fallback: OrtStep | None = None) -> Report:
    """The report of these steps as they are now."""
    return Report(name, threads, tuple(_step(step) for step in steps), fallback.clock.calls if fallback else 0)


def _step(step: AnyStep) -> StepReport:
    if isinstance(step, NativeStep):
        layers = tuple(_native_layers(step))
        return StepReport(step.program.where, step.clock.calls, step.clock.mean_ms, step.segment.exact_padding, layers)
    rows: dict[tuple[str, str], list[str]] = {}
    for node in step.segment.nodes:
        rows.setdefault((node.op, node.why), []).append(node.name)
    layers = tuple(
        LayerReport(names[0] if len(names) == 1 else "", op, FOREIGN, count=len(names), why=why)
        for (op, why), names in rows.items()
    )
    return StepReport(FOREIGN, step.clock.calls, step.clock.mean_ms, True, layers)


def _native_layers(step: NativeStep) -> list[LayerReport]:
    """The engine's operations in order, with format and sparsity where they hold a weight."""
    weights = {layer.name: layer for layer in step.program.layers()}
    times = {row.name: row for row in step.program.profile()}
    nodes = {node.name or node.outputs[0]: node for node in step.segment.graph.nodes}
    rows: list[LayerReport] = []
    for name in dict.fromkeys([*times, *weights]):
        weight, spent, node = weights.get(name), times.get(name), nodes.get(name)
        measured = spent is not None and step.clock.calls > 0
        rows.append(
            LayerReport(
                name=name,
                op=weight.op if weight else node.op if node else name.partition(":")[0],
                where=step.program.where,
                type=weight.type if weight else "",
                format=weight.format if weight else "",
                sparsity=weight.sparsity if weight else None,
                time_ms=spent.seconds * 1e3 if spent is not None and measured else None,
                why=" ".join(filter(None, (node.why if node else "", weight.why if weight else ""))),
            )
        )
    return rows


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plain(text: str) -> str:
    # rich reads [..] as markup; names of nodes may hold brackets.
    return text.replace("[", r"\[")
