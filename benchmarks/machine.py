"""What a result has to say about where it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers" / "bin" / "python"
"""The Python of the peers' environment, which peers.sh makes."""
# The flags that decide which kernels an engine can choose.
ISA = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
       "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "sve2", "bf16")  # fmt: skip
PACKAGES = ("espalier", "onnxruntime", "numpy", "torch", "transformers", "onnx")


def describe() -> dict[str, Any]:
    """CPU, cores, caches, instruction sets, memory and system. What cannot be found is null."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family_model": "/".join(info.get(key, "?") for key in ("cpu family", "model")) if info else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "isa": [flag for flag in ISA if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": "hypervisor" in flags,
        "system": f"{platform.system()} {platform.machine()}, libc {'-'.join(platform.libc_ver())}",
    }


def versions() -> dict[str, str]:
    """Python's and the packages' versions in this environment; the peers report their own."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with `+changes` when tracked files differ from it; None outside a repository."""
    try:
        head = _output("git", "rev-parse", "HEAD")
        return head + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def busy(seconds: float = 0.5) -> float | None:
    """Share of the machine's processor time that was in use while this process slept; None where it cannot be told."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        later, later_idle = ticks()
    except (OSError, ValueError, IndexError):
        return None
    return round(1 - (later_idle - idle) / max(1, later - total), 3)


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _caches() -> dict[str, str] | None:
    """Size by level, as `lscpu` sums them up, e.g. `{"L1d": "64 KiB (2 instances)"}`."""
    try:
        fields = json.loads(_output("lscpu", "--json"))["lscpu"]
    except (OSError, subprocess.CalledProcessError, ValueError, KeyError):
        return None
    found: dict[str, str] = {}

    def walk(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            name = entry["field"].rstrip(":")
            if name.endswith(" cache"):
                found[name.removesuffix(" cache")] = entry["data"]
            walk(entry.get("children", []))

    walk(fields)
    return found or None
