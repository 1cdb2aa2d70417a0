"""What a run shows: lines for logs, a bar for people."""

from __future__ import annotations

import io

import pytest

from espalier.compression import progress
from espalier.compression.progress import Bar, Lines, Status, monitor

STATUS = Status(step=7, fraction=0.25, loss=0.5, sparsity=0.8, learning_rate=1e-3, tokens_per_second=2000.0, eta=90.0)


def test_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as lines:
        lines.stage("pruning")
        for _ in range(100):
            lines.step(STATUS)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "pruning",
        "step 7 (25%): loss 0.5000, sparsity 80.0%, 2000 tokens/s, 2 min left",
    ]


def test_a_bar_where_someone_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    chosen = monitor()
    assert isinstance(chosen, Bar)
    with chosen as bar:
        bar.stage("pruning [to] 80%")
        bar.step(STATUS)
        bar.say("kept [line]")
        assert isinstance(bar, Bar)
        assert bar._progress is not None
        task = bar._progress.tasks[0]
        assert task.completed == 0.25
        assert "loss 0.5000, sparsity 80.0%" in task.description
    assert "kept [line]" in terminal.getvalue()
    bar.step(STATUS)  # after the end nothing is shown, and nothing breaks


def test_lines_where_no_one_does() -> None:
    assert isinstance(monitor(), Lines)
    assert progress.duration(3600) == "60 min"
