"""Every command on a real, tiny model: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import espalier
from espalier.bench import run as bench_run
from espalier.errors import EngineError

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def test_version_and_module() -> None:
    done = subprocess.run([sys.executable, "-m", "espalier", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"espalier, version {espalier.__version__}"


def test_inspect(run: Run, model: Path) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0
    assert "input_ids  tensor(int64)  [batch, seq]" in result.stdout
    assert "embedding  tensor(float)  [batch, 16]" in result.stdout
    assert "Attention" in result.stdout


def test_inspect_json(run_json: RunJson, model: Path) -> None:
    said = run_json("inspect", model, "--json")
    assert said["kind"] == "onnx"
    assert [info["name"] for info in said["inputs"]] == ["input_ids", "attention_mask"]
    assert said["outputs"] == [{"name": "embedding", "type": "tensor(float)", "shape": ["batch", 16]}]
    ops = {layer["op"]: layer for step in said["report"]["steps"] for layer in step["layers"]}
    assert ops["Linear"]["where"] == "native"
    assert ops["Linear"]["sparsity"] > 0.8


def test_run_writes_what_a_session_returns(run: Run, model: Path, inputs: Path, tmp_path: Path) -> None:
    result = run("run", model, "--inputs", inputs, "--output", "out.npz")
    assert result.exit_code == 0, result.output
    with np.load(inputs) as feeds, np.load(tmp_path / "out.npz") as got:
        want = espalier.load(model, tune=False).run(None, dict(feeds))
        np.testing.assert_allclose(got["embedding"], want[0], atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["in.npz", "out.npz"]


def test_compile_writes_a_plan_that_gives_the_same_answers(run: Run, model: Path, inputs: Path, tmp_path: Path) -> None:
    assert run("compile", model, "-o", "tiny.espalier", "--exact").exit_code == 0
    for source, out in ((model, "a.npz"), ("tiny.espalier", "b.npz")):
        assert run("run", source, "--inputs", inputs, "--output", out, "--no-tune").exit_code == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_allclose(a["embedding"], b["embedding"], atol=1e-5)


BENCHMARK = ("--batch", 3, "--seq", 12, "--rounds", 2, "--warmup", 0, "--threads", 1, "--no-tune")


def test_benchmark_against_onnxruntime(run: Run, model: Path) -> None:
    result = run("benchmark", model, "--against", "onnxruntime", *BENCHMARK)
    assert result.exit_code == 0, result.output
    assert "ok   embedding" in result.stdout
    assert "times as fast as onnxruntime" in result.stdout


def test_benchmark_json_is_pure_and_complete(run_json: RunJson, model: Path) -> None:
    said = run_json("benchmark", model, "--against", "onnxruntime", "--ragged", *BENCHMARK, "--json")
    assert said["agrees"] is True
    assert [row["output"] for row in said["agreement"]] == ["embedding", "embedding (ragged)"]
    assert [row["name"] for row in said["candidates"]] == ["espalier", "onnxruntime", "espalier, ragged"]
    for row in said["candidates"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["tokens_per_s"] == pytest.approx(said["settings"]["tokens"] / row["p50_ms"] * 1e3)
    assert said["settings"]["samples"] == 3
    assert said["settings"]["threads"] == 1
    assert "load" not in said["settings"]
    assert said["machine"]["isa"]
    assert said["ratio"] > 0
    assert str(model.parent) not in json.dumps(said)


def test_benchmark_allows_for_the_roundings_of_8_bits(run_json: RunJson, model: Path, model8: Path) -> None:
    for path, tolerance in ((model, 2e-4), (model8, 0.2)):
        said = run_json("benchmark", path, "--against", "onnxruntime", *BENCHMARK, "--json")
        assert (said["agrees"], said["settings"]["tolerance"]) == (True, tolerance)


def test_benchmark_json_to_a_file_keeps_the_table(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("benchmark", model, *BENCHMARK, "--json", "result.json")
    assert result.exit_code == 0, result.output
    assert "p50 ms" in result.stdout
    assert json.loads((tmp_path / "result.json").read_text())["ratio"] is None


def test_benchmark_of_a_plan_writes_the_peer_a_file(run: Run, model: Path) -> None:
    assert run("compile", model, "-o", "tiny.espalier", "--exact").exit_code == 0
    result = run("benchmark", "tiny.espalier", "--against", "onnxruntime", *BENCHMARK)
    assert result.exit_code == 0, result.output


def test_benchmark_with_real_inputs(run_json: RunJson, model: Path, inputs: Path) -> None:
    said = run_json("benchmark", model, "--inputs", inputs, *BENCHMARK, "--json")
    assert said["settings"]["tokens"] == 6
    assert said["settings"]["inputs"] == "in.npz"


def test_benchmark_does_not_time_wrong_answers(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise EngineError("timed although the outputs disagree")

    monkeypatch.setattr(bench_run, "interleaved", refuse)
    result = run("benchmark", model, "--against", "onnxruntime", *BENCHMARK, "--tolerance", 0)
    assert result.exit_code == 1
    assert "FAIL embedding" in result.stdout
    assert "nothing was timed" in result.stderr


def test_benchmark_says_when_the_peer_is_not_exact(
    run: Run, run_json: RunJson, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Inexact(bench_run.OrtProgram):
        def __init__(self, model: Path, *, threads: int, exact: bool = False) -> None:
            if exact:
                raise EngineError("no such mode")
            super().__init__(model, threads=threads)

    assert run_json("benchmark", model, "--against", "onnxruntime", *BENCHMARK, "--json")["notes"] == []
    monkeypatch.setattr(bench_run, "OrtProgram", Inexact)
    said = run("benchmark", model, "--against", "onnxruntime", *BENCHMARK)
    assert said.exit_code == 0
    assert "its exact mode cannot run this model: no such mode" in " ".join(said.stdout.split())


def test_doctor(run: Run, run_json: RunJson) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "engine" in result.stdout
    said = run_json("doctor", "--json")
    assert said["engine"]["available"] is True
    assert said["limits"]["usable"] >= 1
    assert said["versions"]["espalier"] == espalier.__version__


def test_doctor_says_what_is_wrong_with_a_cap(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_MAX_ISA", "sse9")
    result = run("doctor")
    assert result.exit_code == 1
    assert "sse9" in result.stdout
    assert "unset" in result.stdout
