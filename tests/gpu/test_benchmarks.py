"""The benchmark scripts run from end to end, in their tiny mode on the CPU; they measure nothing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
CONFTEST = Path(__file__).with_name("conftest.py")
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1"}
NAMES = ["ceilings", "kernels", "accuracy", "offline", "server", "plain"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_smoke(name: str, tmp_path: Path) -> None:
    arguments = ["--smoke", "--results", str(tmp_path / f"{name}.json")]
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    if name == "kernels":
        # Under Triton's interpreter, as put right by this folder's conftest.
        code = (
            f"import runpy, sys; sys.path.insert(0, {str(SCRIPTS)!r}); sys.argv[1:] = {arguments!r}; "
            f"runpy.run_path({str(CONFTEST)!r}); runpy.run_path({str(SCRIPTS / 'kernels.py')!r}, run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if name == "kernels" and "Triton is not installed" in done.stderr:
        return
    rows = json.loads((tmp_path / f"{name}.smoke.json").read_text())["rows"]
    assert rows
    assert not [row for row in rows.values() if "error" in row]
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode == 0
    assert json.loads((tmp_path / f"{name}.smoke.json").read_text())["rows"] == rows


def test_every_script_is_in_the_queue() -> None:
    queue = (SCRIPTS / "QUEUE.md").read_text()
    missing = [name for name in NAMES if f"benchmarks/gpu/{name}.py" not in queue]
    assert not missing
