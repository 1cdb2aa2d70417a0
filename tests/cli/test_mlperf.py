"""``espalier mlperf``: options, messages and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from espalier.cli import main


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["mlperf", *arguments])
    return result.exit_code, result.output


def test_run_report_and_submit(tmp_path: Path, squad_file: Path, save_tokenizer: Callable[[Path], None]) -> None:
    pytest.importorskip("mlperf_loadgen", reason="MLPerf's load generator: pip install 'espalier[bench]'")
    model, out = tmp_path / "model", tmp_path / "results"
    model.mkdir()
    save_tokenizer(model)
    run = ["run", str(model), "--benchmark", "custom", "--data", str(squad_file), "-o", str(out)]
    code, said = invoke(*run, "--engine", "noop", "--quick", "0.1", "--scenario", "Offline")
    assert code == 0, said
    assert "Result not verified by MLCommons Association." in said
    code, said = invoke("report", str(out))
    assert code == 0, said
    assert (out / "report.html").is_file()
    code, said = invoke("submit", str(out), "--submitter", "G", "-o", str(tmp_path / "tree"))
    assert code == 2
    assert "custom is not an MLPerf benchmark" in said
    (step,) = out.glob("*/Offline/accuracy/step.json")
    content = json.loads(step.read_text())
    step.write_text(json.dumps({**content, "problems": ["broken"]}))
    (model / "more.txt").write_text("")
    code, said = invoke(*run, "--engine", "noop", "--quick", "0.1", "--scenario", "Offline")
    assert code == 2
    assert "holds results of another system: model changed" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "soon"], "--quick takes a number of seconds"),
        (["--scenario", "interactive"], "unknown scenario 'interactive'"),
        (["--mode", "turbo"], "unknown mode turbo; known: performance, accuracy, find-peak"),
        (["--engine", "abacus"], "unknown engine 'abacus'"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, said = invoke("run", str(tmp_path), "--data", str(tmp_path), "-o", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in said
