"""The report as one HTML file that needs nothing else: no script, no font, no address."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from espalier.mlperf.report.charts import Chart
from espalier.mlperf.report.rows import Row, rows
from espalier.mlperf.report.text import COLUMNS, cells, explanations, facts, notices
from espalier.mlperf.results import System

_STYLE = """
:root { color-scheme: light; --ink: #1d2521; --soft: #5b665f; --line: #d9dfdb; --green: #1b6e4b; --red: #b3402a; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.notice { border-left: 4px solid var(--red); background: #fbf1ee; padding: .5rem .9rem; margin: 1rem 0; }
.notice p { margin: .2rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child th, tr:last-child td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.good { color: var(--green); font-weight: 600; }
.bad { color: var(--red); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .8rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
.facts th { white-space: nowrap; width: 1%; color: var(--soft); font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
ul { margin: .6rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1rem .75rem 3rem; } th, td { padding: .4rem .5rem; } }
"""
_NUMBERS = {"metric", "J/query"}


def as_html(systems: Sequence[System], plots: Sequence[Chart]) -> str:
    """The whole page."""
    title = "MLPerf Inference results"
    warnings = "".join(f"<p>{escape(text)}</p>" for text in notices(systems))
    sections = [
        f"<h1>{title}</h1>",
        f'<div class="notice">{warnings}</div>',
        _summary(systems),
        _plots(plots),
        *(_system(system) for system in systems),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(systems: Sequence[System]) -> str:
    head = "".join(f'<th scope="col"{_align(name)}>{escape(name)}</th>' for name in COLUMNS)
    body = "".join(_row(row) for system in systems for row in rows(system))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Summary</h2><div class="scroll">{table}</div>'


def _row(row: Row) -> str:
    colour = {"validity": "good" if row.conforming else "bad" if not row.valid else ""}
    parts = []
    for name, text in zip(COLUMNS, cells(row), strict=True):
        style = colour.get(name, "")
        content = f'<span class="{style}">{escape(text)}</span>' if style else escape(text)
        parts.append(f"<td{_align(name)}>{content}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def _align(name: str) -> str:
    return ' class="number"' if name in _NUMBERS else ""


def _plots(plots: Sequence[Chart]) -> str:
    if not plots:
        return ""
    figures = "".join(
        f"<figure><h3>{escape(plot.title)}</h3>{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in plots
    )
    return f'<h2>Plots</h2><div class="charts">{figures}</div>'


def _system(system: System) -> str:
    pairs = [(escape(name), escape(value)) for name, value in facts(system)]
    table = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in pairs)
    remarks = [f"{row.scenario}: {text}" for row in rows(system) for text in explanations(row)]
    items = "".join(f"<li>{escape(text)}</li>" for text in remarks)
    return (
        f'<h2>{escape(system.name)}</h2><div class="scroll"><table class="facts"><tbody>{table}</tbody></table></div>'
        + (f"<ul>{items}</ul>" if items else "")
    )
