"""The package as others get it: its metadata, its public names, and a wheel that needs no compiler."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import espalier

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnxruntime", "transformers", "onnx", "numpy", "rich", "click")


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, object] = tomllib.load(file)["project"]
    return found


def test_public_names_exist() -> None:
    assert {name for name in espalier.__all__ if getattr(espalier, name, None) is None} == set()


def test_importing_brings_nothing_heavy_and_changes_nothing() -> None:
    code = (
        "import os, sys, threading\n"
        "before = dict(os.environ)\n"
        "import espalier\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(heavy, os.environ == before, threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] True 1"


def test_the_package_is_typed() -> None:
    assert (ROOT / "src/espalier/py.typed").is_file()


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert project()["license"] == "Apache-2.0"


def test_the_readme_names_commands_that_exist() -> None:
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_the_changelog_starts_with_what_is_not_released_or_this_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:4] == "## ["]
    assert headings[0].startswith(("## [Unreleased]", f"## [{espalier.__version__}]"))


def test_every_module_compiles_on_the_oldest_python() -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))


@pytest.mark.slow
def test_a_wheel_works_without_a_compiler(tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "venv"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    build.append(f"--config-settings=build-dir={tmp_path / 'build'}")
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("espalier-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(name.startswith("espalier/_native.") for name in names)
    assert "espalier/py.typed" in names
    assert [name for name in names if not name.startswith(("espalier/", f"espalier-{espalier.__version__}"))] == []
    venv.create(target, with_pip=True)
    python = target / "bin/python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    # The environment's own programs and nothing else: no compiler, no cmake, no ninja.
    bare = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PATH": str(target / "bin")}
    code = "import espalier._native as n, espalier; print(espalier.__version__, n.current_isa())"
    done = subprocess.run([str(python), "-c", code], env=bare, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == espalier.__version__
    done = subprocess.run(["espalier", "doctor"], env=bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
