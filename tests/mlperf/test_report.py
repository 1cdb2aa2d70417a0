"""Reports: everything that must be said is said, in three forms, and the page stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from espalier.errors import DataError
from espalier.mlperf import results
from espalier.mlperf.report import UNVERIFIED, report, rows
from espalier.mlperf.report.text import QUICK

pytest.importorskip("matplotlib", reason="draws the plots")


class Page(HTMLParser):
    """The ids, the references to other files, and the text of a page; unbalanced tags are an error."""

    _VOID = frozenset(("meta", "path", "use", "rect", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.links.append(value)
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_stands_alone_and_says_what_it_must(quick_results: Path, tmp_path: Path) -> None:
    html, markdown, data = report([quick_results], tmp_path / "report")
    page = Page(html.read_text())
    assert page.links == []
    assert len(page.ids) == len(set(page.ids))
    for said in (" ".join(page.words), markdown.read_text()):
        for sentence in (
            UNVERIFIED,
            QUICK,
            "quick run",
            "F1 0.000 (0.0% of the reference, below 89.965)",
            "(unverified)",
            "the rules demand 600 s",
        ):
            assert sentence in said
    assert "SingleStream: latency" in html.read_text()
    assert "Offline: throughput over time" in html.read_text()
    content = json.loads(data.read_text())
    assert content["notice"] == UNVERIFIED
    assert [row["scenario"] for row in content["systems"][0]["rows"]] == ["SingleStream", "Offline"]


def test_the_same_results_give_the_same_page(quick_results: Path, tmp_path: Path) -> None:
    first, second = (report([quick_results], tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second


def test_full_runs_are_valid(full_results: Path) -> None:
    (system,) = results.read_results(full_results)
    assert [row.validity for row in rows(system)] == ["valid", "valid"]


def test_a_run_that_does_not_count_has_no_figure(quick_results: Path, tmp_path: Path) -> None:
    (path,) = quick_results.glob("*/Offline/performance/step.json")
    step = json.loads(path.read_text())
    path.write_text(json.dumps({**step, "problems": ["the machine slept"]}))
    text = report([quick_results], tmp_path)[1].read_text()
    assert re.search(r"Offline \| - \(unverified\) \| samples/s \| does not count", text)
    assert "- Offline: performance: the machine slept" in text


def test_systems_side_by_side(quick_results: Path, tmp_path: Path) -> None:
    (system,) = (path.parent for path in quick_results.glob("*/system.json"))
    system.rename(quick_results / "<b>other")
    html = report([quick_results, quick_results], tmp_path)[0].read_text()
    assert "&lt;b&gt;other" in html
    assert "<b>" not in html
    assert "Accuracy against throughput" in html


def test_the_search_for_a_rate_is_drawn(quick_results: Path, tmp_path: Path) -> None:
    (path,) = quick_results.glob("*/Offline/performance/step.json")
    search = {
        "trials": [[100.0, False], [80.0, True], [90.0, True]],
        "tails_ms": [400.0, 60.0, 110.0],
        "certainty": "between 90 and 100/s (11.1 % apart), from 3 short runs",
    }
    step = json.loads(path.read_text())
    step |= {"scenario": "Server", "figures": {**step["figures"], "search": search}}
    place = path.parents[2] / "Server" / "performance"
    place.mkdir(parents=True)
    (place / "step.json").write_text(json.dumps(step))
    html, markdown, _ = report([quick_results], tmp_path)
    assert "Server: latency against rate" in html.read_text()
    assert "the rate lies between 90 and 100/s" in markdown.read_text()


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results in it; make some with espalier mlperf run"):
        report([tmp_path], tmp_path)
    (tmp_path / "system.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        report([tmp_path], tmp_path)
