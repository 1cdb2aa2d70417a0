"""Damaged models end in an Espalier exception: never in a crash, a hang, or memory without bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGET = Path(__file__).with_name("target.py")


def fuzz(kind: str, seed: int, count: int, folder: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    command = [sys.executable, str(TARGET), kind, str(seed), str(count), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30 + count, env=environment)
    assert done.returncode == 0, f"exit code {done.returncode}; the case is in {folder}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("kind", ["onnx", "onnx8", "hf", "plan", "plan8"])
def test_a_short_run(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 0, 60, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "onnx8", "hf", "plan", "plan8"])
def test_a_long_run(kind: str, tmp_path: Path) -> None:
    seed, count = (
        int(os.environ.get(f"ESPALIER_FUZZ_{name}", value)) for name, value in (("SEED", 1), ("CASES", 1500))
    )
    fuzz(kind, seed, count, tmp_path)
