"""Models that run elsewhere than in the engine, as far as that shows without a GPU."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import espalier
from espalier.cli import main
from espalier.errors import ConfigError
from espalier.loading import LoadSettings
from espalier.scheduler import Limits
from espalier.serve import ServerConfig

TEXTS = {"model": "embedder", "input": ["w1 w2 w3", "w4"]}


def vectors(client: Any) -> np.ndarray:
    status, found = client.post("/v1/embeddings", TEXTS)
    assert status == 200, found
    return np.array([item["embedding"] for item in found["data"]])


@pytest.fixture(scope="module")
def calibration(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    samples = [[list(range(2, 20)), [3, 4, 5]]]
    return espalier.calibrate(models["embedder"], samples, tmp_path_factory.mktemp("fp8") / "embedder.json")


def test_fp8_by_a_calibration(
    start: Callable[..., Any], client: Any, models: dict[str, Path], calibration: Path
) -> None:
    exact, served = vectors(client), {"embedder": models["embedder"]}
    for load in (
        LoadSettings(device="torch-cpu", precision="fp32"),
        LoadSettings(device="torch-cpu", calibration=calibration),
    ):
        with start(served, load=load) as other:
            error = np.abs(vectors(other) - exact).max()
            assert error < LoadSettings(device="torch-cpu", calibration=calibration).tolerance
            assert (error > 1e-4) == (load.calibration is not None)
            (about,) = other.get("/status")[1]["models"]
            assert about["native_layers"] == about["layers"] > 0
            types = {layer.type for layer in other.server.service.models.get("embedder").session.report().layers}
            assert ("fp8" in types) == (load.calibration is not None)


def test_models_are_warm_before_the_server_is_ready(
    start: Callable[..., Any], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from espalier.gpu.runtime import CpuRuntime

    captured: list[object] = []
    monkeypatch.setattr(CpuRuntime, "captures", True)
    monkeypatch.setattr(CpuRuntime, "capture", lambda _, work, *rest: captured.append(rest) or work)
    load = LoadSettings(device="torch-cpu", precision="fp32")
    with start({"embedder": models["embedder"]}, load=load, limits=Limits(tokens=128)) as client:
        before = len(captured)
        assert before >= 2 * 2  # buckets of 64 and 128 tokens, in two lanes
        vectors(client)
        assert len(captured) == before


def test_the_largest_batch_is_the_servers(start: Callable[..., Any], slow: Any) -> None:
    with start({"slow": Path("nowhere")}, limits=Limits(tokens=100)):
        assert slow.warmed == 100


def test_a_calibration_is_of_one_model(models: dict[str, Path], tmp_path: Path) -> None:
    load = LoadSettings(device="torch-cpu", calibration="scales.json")
    ServerConfig(load=load).check_models(["a"])
    with pytest.raises(ConfigError, match=r"of one model, and there are 2 \(a, b\)"):
        ServerConfig(load=load).check_models(["a", "b"])
    with pytest.raises(ConfigError, match="--load-from or --calibration"):
        ServerConfig(load=load, load_from=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", "scales.json"], "a calibration is for FP8 on a GPU"),
        (["--precision", "bf16"], "precision 'bf16' needs a GPU"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "torch-cpu", "--calibration", "nothing.json"], "nothing.json does not exist"),
        (["--device", "torch-cpu", "--precision", "fp8"], "run `espalier calibrate`"),
    ],
)
def test_what_cannot_be_served(models: dict[str, Path], options: list[str], message: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    refused(models["embedder"], options, message)


def test_without_torch(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_torch)
    refused(models["embedder"], ["--device", "cuda"], "pip install 'espalier[gpu]'")


def refused(model: Path, options: list[str], message: str) -> None:
    """The command ends with one message."""
    result = CliRunner().invoke(main, ["serve", str(model), "--http", "0", "--grpc", "0", "--no-tune", *options])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("espalier: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
