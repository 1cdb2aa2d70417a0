"""The verb ``report``: HTML in one file, Markdown and JSON, of one system or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from espalier.mlperf.report.rows import UNVERIFIED, Row, rows
from espalier.mlperf.results import System, read_results

__all__ = ["UNVERIFIED", "Row", "report", "rows"]

NAMES = ("report.html", "report.md", "report.json")


def report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of every system in ``folders`` to the folder ``out``; returns the files.

    Raises DataError for a folder without results, MissingDependencyError without matplotlib.
    """
    from espalier.mlperf.report.charts import charts
    from espalier.mlperf.report.page import as_html
    from espalier.mlperf.report.text import as_dict, as_markdown

    systems: list[System] = [system for folder in folders for system in read_results(folder)]
    contents = (
        as_html(systems, charts(systems)),
        as_markdown(systems),
        json.dumps(as_dict(systems), indent=2, default=str) + "\n",
    )
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in NAMES]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    return paths
