"""What `import espalier` may not do, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import espalier

PROGRAM = """
import os, sys, threading
before, tasks = dict(os.environ), len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1
import espalier
assert dict(os.environ) == before, 'the environment changed'
assert threading.active_count() == 1, 'a thread started'
if os.path.isdir('/proc/self/task'):
    assert len(os.listdir('/proc/self/task')) == tasks, 'a native thread started'
heavy = {'onnx', 'onnxruntime', 'torch', 'transformers', 'rich', 'click', 'numpy', 'safetensors', 'ray'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
{then}
assert not (heavy - {allowed}) & set(sys.modules), (heavy - {allowed}) & set(sys.modules)
assert dict(os.environ) == before, 'the environment changed'
print('fine')
"""


def run(then: str, allowed: set[str]) -> None:
    source = PROGRAM.replace("{then}", then).replace("{allowed}", repr(allowed or {""}))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_importing_loads_nothing_heavy() -> None:
    run("espalier.errors.EspalierError", set())


def test_reaching_for_the_verbs_needs_numpy_only() -> None:
    run("espalier.load, espalier.compile, espalier.Session", {"numpy"})


def test_public_names() -> None:
    names = ["Session", "__version__", "calibrate", "compile", "compress", "errors", "load"]
    assert espalier.__all__ == names
    assert set(espalier.__all__) <= set(dir(espalier))
    for name in espalier.__all__:
        assert getattr(espalier, name) is not None
    assert not hasattr(espalier, "lode")
