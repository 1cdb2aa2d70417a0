"""The report: complete as JSON, readable as Markdown, drawn as plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from espalier.compression.measure import Sizes, Speed
from espalier.compression.report import CompressionReport, LayerRow
from espalier.compression.tasks import Interval, Metric
from espalier.compression.trainer import History, plain
from espalier.errors import CheckpointError


@pytest.fixture
def report() -> CompressionReport:
    rows = [
        {"step": n, "epoch": 0, "tokens": n * 9, "sparsity": 0.5, "learning_rate": 1e-4, "loss": 1 / n, "hidden": 1 / n}
        for n in (10, 20)
    ]
    prunings = [{"step": 0, "fraction": 0.0, "target": 0.9, "sparsity": 0.9, "seconds": 1.5, "report": {}}]
    layer = LayerRow("encoder.0", (64, 32), "4x1", 0.9, 0.25, 0.125, "4x1", dense_ms=3.0, sparse_ms=1.0)
    return CompressionReport(
        model="tiny",
        task="embeddings",
        output="out",
        sparsity=0.9,
        config={"sparsity": 0.9, "training": {"steps": 20}},
        layers=(layer, LayerRow("encoder.1", (64, 32), "4x1", 0.9)),
        history=History(rows, prunings, ["a note"], 20, 180, 65.0),
        dense=Metric("spearman", 0.8, 0.7, 0.9, 100),
        compressed=Metric("spearman", 0.76, 0.66, 0.86, 100),
        recovery=Interval(0.93, 0.97),
        sizes=Sizes(1000, 1000, 1000, 200),
        speed=Speed(1000.0, 4000.0, 2, 500, 10, {"encoder.0": 3.0}, {"encoder.0": 1.0}),
        checks=("ok   zeros kept: all",),
    )


def test_summary(report: CompressionReport) -> None:
    text = str(report)
    assert report.recovered == pytest.approx(0.95)
    for part in ("90.0%", "recovered 95.00% (95 % 93.00%-97.00%)", "4.00 times as fast", "20 steps", "a note"):
        assert part in text


def test_json_and_markdown_and_plots(report: CompressionReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    report.save(tmp_path)
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["recovered"] == pytest.approx(0.95)
    assert said["layers"][0]["speedup"] == pytest.approx(3.0)
    assert said["speed"]["ratio"] == pytest.approx(4.0)
    assert said["history"]["prunings"][0]["target"] == 0.9
    text = (tmp_path / "report.md").read_text()
    assert "| encoder.0 | 64x32 | 4x1 | 90.0% | 0.2500 | 0.1250 | 4x1 | 3.00 | 1.00 | 3.00 |" in text
    assert "![training](plots/training.png)" in text
    assert (tmp_path / "plots" / "layers.png").stat().st_size > 1000
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_report_that_cannot_be_written(report: CompressionReport, tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write the report"):
        report.save(tmp_path)


def test_without_figures_there_is_no_recovery() -> None:
    report = CompressionReport("m", "none", None, 0.5, {}, (), History())
    assert report.recovered is None
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["recovered"] is None


def test_plain_values() -> None:
    assert plain({"a": (1, float("nan")), 2: {3.0}, "p": Path("x")}) == {"a": [1, None], "2": [3.0], "p": "x"}
