"""Plots as SVG, drawn by matplotlib, to stand inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from espalier.errors import MissingDependencyError
from espalier.mlperf.benchmarks import SCENARIOS
from espalier.mlperf.report import series
from espalier.mlperf.results import System

_COLOURS = ("#1b6e4b", "#c8553d", "#2f5f98", "#a0782c", "#6b4c9a", "#4d4d4d", "#138086", "#b5316a")
_STYLES = ("-", "--", "-.", ":")
_SIZE = (5.2, 3.5)


@dataclass(frozen=True)
class Chart:
    """A plot and what it shows, in a sentence."""

    title: str
    caption: str
    svg: str


def charts(systems: Sequence[System]) -> list[Chart]:
    """Every plot there is data for. Raises MissingDependencyError without matplotlib."""
    return list(_charts(systems))


def _charts(systems: Sequence[System]) -> Iterator[Chart]:
    for scenario in SCENARIOS:
        curves = [c for system in systems if (c := series.latency_cdf(system, scenario)) is not None]
        if curves:
            yield _lines(
                f"{scenario}: latency",
                "Share of queries answered within a time, from issue to answer as the system under test saw them.",
                curves,
                x="ms",
                y="share of queries",
                log_x=True,
            )
    for scenario in ("Server", "Offline"):
        curves = [c for system in systems if (c := series.throughput(system, scenario)) is not None]
        if curves:
            caption = "Samples answered per second over the run."
            yield _lines(f"{scenario}: throughput over time", caption, curves, x="s", y="samples/s")
    trials = [found for system in systems if (found := series.server_trials(system)) is not None]
    if trials:
        yield _trials(trials)
    points = [(s.name, *p) for s in systems if (p := series.accuracy_and_speed(s)) is not None]
    if len(points) > 1:
        yield _points(points, str(systems[0].about["title"]))


def _axes(x: str, y: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"plots need matplotlib, which cannot be imported ({error}): pip install 'espalier[bench]'"
        ) from error
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _lines(title: str, caption: str, curves: Sequence[series.Curve], *, x: str, y: str, log_x: bool = False) -> Chart:
    figure, axes = _axes(x, y)
    for i, curve in enumerate(curves):
        style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
        axes.plot(curve.x, curve.y, style, label=curve.label, color=_COLOURS[i % len(_COLOURS)], linewidth=1.6)
    axes.set_ylim(bottom=0)
    if log_x:
        axes.set_xscale("log")
    _legend(axes, len(curves))
    return Chart(title, caption, _svg(figure, title))


def _trials(trials: Sequence[tuple[series.Curve, Any]]) -> Chart:
    title = "Server: latency against rate"
    figure, axes = _axes("queries/s", "99th percentile, ms")
    for i, (curve, good) in enumerate(trials):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(curve.x, curve.y, color=colour, linewidth=1, label=curve.label)
        axes.plot(curve.x[good], curve.y[good], "o", color=colour)
        axes.plot(curve.x[~good], curve.y[~good], "x", color=colour)
    axes.set_yscale("log")
    _legend(axes, len(trials))
    caption = "The short runs of the search for the rate: a dot kept the bound, a cross did not."
    return Chart(title, caption, _svg(figure, title))


def _points(points: Sequence[tuple[str, float, float]], benchmark: str) -> Chart:
    title = "Accuracy against throughput"
    figure, axes = _axes("Offline samples/s", "accuracy, %")
    for i, (name, speed, accuracy) in enumerate(points):
        axes.plot([speed], [accuracy], "o", color=_COLOURS[i % len(_COLOURS)], label=name)
    axes.set_xscale("log")
    axes.margins(0.15)
    _legend(axes, len(points))
    return Chart(title, f"{benchmark}. Each dot is a system.", _svg(figure, title))


def _legend(axes: Any, count: int) -> None:
    if count:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)


def _svg(figure: Any, title: str) -> str:
    """The figure as an ``<svg>`` element whose ids clash with those of no other."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}-", text)
    # Its own size would not shrink with the page; the view box says enough.
    return re.sub(r'<svg([^>]*?) height="[^"]*"([^>]*?) width="[^"]*"|<svg([^>]*?) width="[^"]*" height="[^"]*"',
                  r"<svg\1\2\3", text, count=1).replace("<svg", f'<svg role="img" aria-label="{title}"', 1)  # fmt: skip
