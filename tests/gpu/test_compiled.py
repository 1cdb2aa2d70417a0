"""Kernels become machine code for Hopper and Ampere: the compiler refuses what the interpreter lets through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SHARED = 227 << 10
"""Bytes of shared memory a Hopper multiprocessor gives one program."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'espalier[gpu]'")
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """In a process of its own, because this one may interpret; with a cache of its own, so that it does compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED]
    products = [kernel for kernel in kernels if kernel["kernel"] in ("_gemm_kernel", "_attention_kernel")]
    assert all(kernel["matrix_unit"] == ("wgmma" if kernel["capability"] == 90 else "mma") for kernel in products)
    assert all(kernel["tma"] for kernel in products if kernel["kernel"] == "_gemm_kernel")
