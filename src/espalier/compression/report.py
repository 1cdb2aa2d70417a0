"""What a compression run did, layer by layer and overall: as JSON, as Markdown, and as plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier.compression.measure import Sizes, Speed
from espalier.compression.progress import duration
from espalier.compression.quantization.quantizer import QuantizationReport
from espalier.compression.trainer import History, plain
from espalier.data.metrics import LEVEL, Interval, Metric
from espalier.errors import CheckpointError
from espalier.files import replacing

JSON = "report.json"
MARKDOWN = "report.md"
PLOTS = "plots"


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer. ``error_*``: what the last pruning cost, before and after the weights that stay were corrected,
    in the unit of its score; ``*_ms``: time in the engine, ``expected_speedup`` from measured costs.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    error_before: float | None = None
    error_after: float | None = None
    format: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None
    expected_speedup: float | None = None

    @property
    def speedup(self) -> float | None:
        """Measured, against the dense layer."""
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None


@dataclass(frozen=True)
class CompressionReport:
    """A finished run. ``str(report)`` is a summary; :meth:`save` writes it out.

    ``dense`` and ``compressed`` are the task's figure on held-out data, None without such data.
    """

    model: str
    task: str
    output: str | None
    sparsity: float
    config: dict[str, Any]
    layers: tuple[LayerRow, ...]
    history: History
    quantization: QuantizationReport | None = None
    dense: Metric | None = None
    compressed: Metric | None = None
    recovery: Interval | None = None
    sizes: Sizes | None = None
    speed: Speed | None = None
    checks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def recovered(self) -> float | None:
        """The compressed model's figure over the dense model's."""
        if self.dense is None or self.compressed is None or self.dense.value == 0:
            return None
        return self.compressed.value / self.dense.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        found: dict[str, Any] = plain(asdict(self))
        found["recovered"] = plain(self.recovered)
        if self.speed is not None:
            found["speed"] = plain(self.speed.to_dict())
        for row, layer in zip(found["layers"], self.layers, strict=True):
            row["speedup"] = plain(layer.speedup)
        return found

    def __str__(self) -> str:
        return "\n".join(self.summary())

    def summary(self) -> list[str]:
        """The main figures, a line each."""
        lines = [f"{self.model}: {self.sparsity:.1%} of the prunable weights are zero"]
        if self.quantization is not None:
            lines.append(str(self.quantization))
        if self.dense is not None:
            lines.append(f"dense   {self.dense}")
        if self.compressed is not None:
            lines.append(f"now     {self.compressed}")
        if self.recovered is not None:
            interval = ""
            if self.recovery is not None:
                interval = f" ({LEVEL} % {self.recovery.low:.2%}-{self.recovery.high:.2%})"
            lines.append(f"recovered {self.recovered:.2%}{interval}")
        if self.speed is not None:
            s = self.speed
            lines.append(
                f"{s.ratio:.2f} times as fast: {s.sparse:.0f} tokens/s, dense {s.dense:.0f}, {s.threads} threads, "
                f"{s.sequences} ragged sequences"
            )
        if self.sizes is not None:
            plan = f", compiled {_mb(self.sizes.plan)}" if self.sizes.plan else ""
            lines.append(f"weights {_mb(self.sizes.sparse)} (dense {_mb(self.sizes.dense)}){plan}")
        h = self.history
        if h.step:
            lines.append(f"trained {h.step} steps, {h.tokens} tokens, {duration(h.seconds)}")
        lines += [f"note: {note}" for note in (*self.notes, *h.notes)]
        return lines

    def to_markdown(self, plots: Sequence[str] = ()) -> str:
        """The whole report; ``plots`` are paths of images to show."""
        kind = ", int8" if self.quantization is not None else ""
        title = f"# {self.model}, {self.sparsity:.0%} zeros{kind}, {self.task}"
        parts = [title, "\n".join(f"- {line}" for line in self.summary())]
        if self.checks:
            parts += ["## Verification", "\n".join(f"- {check}" for check in self.checks)]
        if self.layers:
            parts += ["## Layers", f"Errors are those of the last pruning: {self._unit()}.", self._layer_table()]
        if self.quantization is not None:
            parts += ["## Quantisation", _QUANTIZATION, self._quantization_table(self.quantization)]
        if self.history.prunings:
            rows = ["| step | sparsity | seconds |", "| ---: | ---: | ---: |"]
            rows += [f"| {p['step']} | {p['sparsity']:.1%} | {p['seconds']:.1f} |" for p in self.history.prunings]
            parts += ["## Prunings", "\n".join(rows)]
        parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
        settings = {"config": self.config, "data": self.data, "machine": self.machine, "versions": self.versions}
        parts += ["## Settings", "```json\n" + json.dumps(plain(settings), indent=2) + "\n```"]
        return "\n\n".join(parts) + "\n"

    def _unit(self) -> str:
        """What the layers' errors are shares of."""
        last = self.history.prunings[-1] if self.history.prunings else {}
        return str(last.get("report", {}).get("unit", "none was made"))

    def _layer_table(self) -> str:
        rows = [
            "| layer | shape | pattern | zeros | error before | after | format | dense ms | ms | speed-up | expected |",
            "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for layer in self.layers:
            cells = [
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.pattern,
                f"{layer.sparsity:.1%}",
                _number(layer.error_before, ".4f"),
                _number(layer.error_after, ".4f"),
                layer.format,
                _number(layer.dense_ms, ".2f"),
                _number(layer.sparse_ms, ".2f"),
                _number(layer.speedup, ".2f"),
                _number(layer.expected_speedup, ".2f"),
            ]
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows)

    def _quantization_table(self, quantization: QuantizationReport) -> str:
        rows = [
            "| layer | inputs | error, static | dynamic | now | cut off | harm | why |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for layer in quantization.layers:
            figures = (layer.error_static, layer.error_token, layer.error, layer.saturated, layer.harm)
            cells = [layer.name, layer.activations, *(_number(figure, ".1e") for figure in figures), layer.why]
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows)

    def save(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and the plots. Raises CheckpointError when that is impossible."""
        try:
            plots = [str(path.relative_to(folder)) for path in self.plot(folder / PLOTS)]
            _write(folder / JSON, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
            _write(folder / MARKDOWN, self.to_markdown(plots))
        except OSError as error:
            raise CheckpointError(f"cannot write the report into {folder}: {error.strerror or error}") from error

    def plot(self, folder: Path) -> list[Path]:
        """Draw loss and sparsity over the steps, and sparsity and error by layer. Nothing without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        found: list[Path] = []
        if self.history.steps:
            figure = Figure(figsize=(8, 4), layout="constrained")
            _plot_training(figure, self.history)
            found.append(folder / "training.png")
            figure.savefig(found[-1], dpi=120)
        if self.layers:
            figure = Figure(figsize=(8, 1.5 + 0.18 * len(self.layers)), layout="constrained")
            _plot_layers(figure, self.layers, self._unit())
            found.append(folder / "layers.png")
            figure.savefig(found[-1], dpi=120)
        return found


_QUANTIZATION = (
    "Errors are shares of the squared norm of the layer's outputs: rounded plainly with static and with dynamic "
    "inputs, and as the layer is now. Cut off: share of the inputs beyond the static range. Harm: share of the "
    "variance of the model's outputs that is lost when this layer alone, with those that share its input, is quantised."
)


def _plot_training(figure: Any, history: History) -> None:
    axes = figure.subplots()
    steps = [row["step"] for row in history.steps]
    for name in [name for name in history.steps[0] if name not in _NOT_LOSSES]:
        axes.plot(steps, [row.get(name) for row in history.steps], label=name, linewidth=1)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    other = axes.twinx()
    other.step(steps, [100 * row["sparsity"] for row in history.steps], where="post", color="0.6", label="zeros")
    other.set_ylabel("zeros, %")
    other.set_ylim(0, 100)
    axes.legend(loc="lower left")


_NOT_LOSSES = frozenset({"step", "epoch", "tokens", "sparsity", "learning_rate"})


def _plot_layers(figure: Any, layers: Sequence[LayerRow], unit: str) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(layers))
    left.barh(places, [100 * layer.sparsity for layer in layers], color="0.5")
    left.set_yticks(list(places), [layer.name for layer in layers], fontsize=6)
    left.invert_yaxis()
    left.set_xlabel("zeros, %")
    right.barh(places, [layer.error_before or 0.0 for layer in layers], height=0.8, color="0.8", label="before")
    right.barh(places, [layer.error_after or 0.0 for layer in layers], height=0.4, color="tab:blue", label="after")
    right.set_xlabel(f"error of the last pruning:\n{unit}", fontsize=8)
    right.locator_params(axis="x", nbins=4)
    right.legend(fontsize=6)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
