"""Runs the tests of Triton kernels in a process of their own, where Triton interprets instead of compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'espalier[gpu]'")
def test_kernels_under_the_interpreter() -> None:
    """Triton decides at import, so one process cannot both interpret and compile."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_kernels or interpreted_program",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    files = [str(HERE / "test_kernels.py"), str(HERE / "test_program.py")]
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
