"""What this machine and this installation have, and what about them costs speed."""

from __future__ import annotations

import importlib
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier._cpu import cgroup_quota, usable_cores
from espalier.errors import EngineError

if TYPE_CHECKING:
    from espalier.compiler.packed import Accelerator

# Flags of /proc/cpuinfo that decide which kernels can run; anything else there is noise here.
_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

_ENGINE_VARIABLE = "ESPALIER_MAX_ISA"


@dataclass(frozen=True)
class Cache:
    """One cache of CPU 0: level, kind (``Data``, ``Instruction``, ``Unified``), bytes, and how many CPUs share it."""

    level: int
    kind: str
    size: int
    shared_by: int


@dataclass(frozen=True)
class Cpu:
    """The processor. ``flags`` are those that decide about kernels, as the kernel of the system names them."""

    model: str
    architecture: str
    logical: int
    physical: int | None
    flags: tuple[str, ...]
    caches: tuple[Cache, ...]
    governor: str | None
    load: float | None


@dataclass(frozen=True)
class Limits:
    """What this process may use: CPUs of its affinity, cores of its cgroup quota (None without one), and both."""

    affinity: int
    quota: float | None
    usable: int


@dataclass(frozen=True)
class Engine:
    """The native engine: whether it loads, the ISA it selected, what the CPU offers it, and a cap set by the user."""

    available: bool
    isa: str | None
    detected: tuple[str, ...]
    cap: str | None
    problem: str


@dataclass(frozen=True)
class Extra:
    """One optional part of the package: what it needs and which of that is missing."""

    name: str
    needs: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """Something that is broken or costs speed, and what to do about it."""

    kind: str  # "broken" or "slow"
    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `espalier doctor` says."""

    python: str
    system: str
    cpu: Cpu
    limits: Limits
    engine: Engine
    versions: dict[str, str]
    extras: tuple[Extra, ...]
    findings: tuple[Finding, ...] = field(default=())

    @property
    def broken(self) -> bool:
        """Whether something does not work at all."""
        return any(finding.kind == "broken" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        return asdict(self)


def diagnose(root: Path = Path("/")) -> Diagnosis:
    """Look at the machine, the limits on this process and the installation. ``root`` is for tests: a made-up ``/``."""
    processor, limits, engine = cpu(root), process_limits(root), native_engine()
    versions, extras = installed(), optional_parts()
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        cpu=processor,
        limits=limits,
        engine=engine,
        versions=versions,
        extras=extras,
        findings=tuple(findings(processor, limits, engine)),
    )


def machine(accelerator: Accelerator | None = None) -> dict[str, Any]:
    """The part of a diagnosis that a benchmark result needs, so that its figures name their machine.

    ``accelerator``: the one it ran on, as :attr:`Session.accelerator` says.
    """
    processor, limits, engine = cpu(), process_limits(), native_engine()
    return {
        "cpu": processor.model,
        "architecture": processor.architecture,
        "flags": list(processor.flags),
        "cores_usable": limits.usable,
        "accelerators": [] if accelerator is None else [asdict(accelerator)],
        "isa": engine.isa,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": installed(),
    }


def cpu(root: Path = Path("/")) -> Cpu:
    """The processor, from ``/proc/cpuinfo`` and ``/sys`` where there are such."""
    text = _read(root / "proc/cpuinfo") or ""
    fields = dict(re.findall(r"^([^\t\n:]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    words = set((fields.get("flags") or fields.get("Features") or "").split())
    places = set(re.findall(r"^physical id\s*:\s*(\d+)(?:\n.+)*?\ncore id\s*:\s*(\d+)", text, re.MULTILINE))
    return Cpu(
        model=fields.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        logical=os.cpu_count() or 1,
        physical=len(places) or None,
        flags=tuple(flag for flag in _FLAGS if flag in words),
        caches=tuple(_caches(root / "sys/devices/system/cpu/cpu0/cache")),
        governor=_line(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _caches(folder: Path) -> list[Cache]:
    caches: list[Cache] = []
    for index in sorted(folder.glob("index[0-9]*")):
        level, kind, size = (_line(index / name) for name in ("level", "type", "size"))
        amount = re.fullmatch(r"(\d+)([KMG]?)", size or "")
        if level is None or kind is None or amount is None:
            continue
        unit = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[amount[2]]
        shared = _count(_line(index / "shared_cpu_list") or "0")
        caches.append(Cache(int(level), kind, int(amount[1]) * unit, shared))
    return caches


def _count(cpus: str) -> int:
    """How many CPUs a list like ``0-3,8`` names."""
    ends = [part.split("-") for part in cpus.split(",") if part]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def process_limits(root: Path = Path("/")) -> Limits:
    """What this process may use of the machine."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Limits(affinity, cgroup_quota(root), usable_cores(root))


def native_engine() -> Engine:
    """The native engine as it is on this machine. It says so itself when it cannot be loaded, and does not raise."""
    cap = os.environ.get(_ENGINE_VARIABLE)
    try:
        native = importlib.import_module("espalier._native")
    except ImportError as error:
        return Engine(False, None, (), cap, f"the native engine cannot be loaded: {error}")
    try:
        return Engine(True, native.current_isa(), tuple(native.arch_flags()), cap, "")
    except EngineError as error:
        # A cap that names no instruction set.
        return Engine(False, None, (), cap, str(error))


def installed() -> dict[str, str]:
    """Versions of Espalier and of everything it names as a dependency, required or optional, that is installed."""
    names = ["espalier", *(name for name, _ in _requirements())]
    versions = {name: _version(name) for name in dict.fromkeys(names)}
    return {name: version for name, version in versions.items() if version is not None}


def optional_parts() -> tuple[Extra, ...]:
    """The extras of the package and what of each is missing."""
    needs: dict[str, list[str]] = {}
    for name, extra in _requirements():
        if extra and name != "espalier":
            needs.setdefault(extra, []).append(name)
    return tuple(
        Extra(extra, tuple(names), tuple(name for name in names if _version(name) is None))
        for extra, names in sorted(needs.items())
    )


def _requirements() -> list[tuple[str, str]]:
    """Name and extra ("" when always required) of every requirement in the package's metadata."""
    try:
        lines = metadata.requires("espalier") or []
    except metadata.PackageNotFoundError:
        # Run from a source tree that is not installed: nothing says what is needed.
        lines = ["numpy", "onnx", "onnxruntime", "safetensors", "click", "rich"]
    found: list[tuple[str, str]] = []
    for line in lines:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", line)
        if name:
            found.append((name[0], extra[1] if extra else ""))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "espalier":
            from espalier import __version__

            return __version__
        return None


def findings(processor: Cpu, limits: Limits, engine: Engine) -> list[Finding]:
    """What is broken or slow, worst first. A function of what was found alone, so that tests can make it up."""
    found: list[Finding] = []
    if not engine.available:
        remedy = "install a wheel for this platform, or build it: pip install espalier --no-binary espalier"
        if engine.cap:
            remedy = f"correct {_ENGINE_VARIABLE}, or unset it"
        found.append(Finding("broken", engine.problem, remedy))
    if engine.isa == "scalar":
        why = f"{_ENGINE_VARIABLE} is set" if engine.cap else "this CPU has neither AVX2 with FMA nor NEON"
        found.append(Finding("slow", f"the engine runs plain C++ kernels: {why}", "run on a CPU that has them"))
    elif engine.cap and engine.isa:
        found.append(
            Finding(
                "slow", f"{_ENGINE_VARIABLE}={engine.cap} caps the kernels at {engine.isa}", f"unset {_ENGINE_VARIABLE}"
            )
        )
    if engine.available and "amx_int8" in processor.flags and "amx_int8" not in engine.detected:
        what = "this CPU has AMX, but the system does not let this process use its tile registers"
        remedy = "use Linux 5.16 or later, and let the sandbox (seccomp) pass arch_prctl; AVX-512 does the work so far"
        found.append(Finding("slow", what, remedy))
    if limits.quota is not None and limits.quota < limits.affinity:
        remedy = "raise the container's CPU limit; more threads than the quota only wait for each other"
        found.append(
            Finding(
                "slow",
                f"a cgroup quota allows {limits.quota:g} of {limits.affinity} CPUs; sessions use {limits.usable}",
                remedy,
            )
        )
    elif limits.affinity < processor.logical:
        remedy = "start the process with a wider CPU affinity (taskset, cpuset) to use the others"
        found.append(Finding("slow", f"this process may run on {limits.affinity} of {processor.logical} CPUs", remedy))
    if processor.physical is not None and processor.physical < min(limits.usable, processor.logical):
        remedy = (
            f"compare load(..., threads={processor.physical}) with the default: two threads of a core share its units"
        )
        found.append(Finding("slow", f"{limits.usable} usable CPUs are {processor.physical} physical cores", remedy))
    if processor.governor == "powersave":
        found.append(
            Finding("slow", "the CPU frequency governor is powersave", "as root: cpupower frequency-set -g performance")
        )
    if processor.load is not None and processor.load > processor.logical:
        what = f"the machine is busy: load {processor.load:.1f} on {processor.logical} CPUs"
        found.append(Finding("slow", what, "measure when nothing else runs"))
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _line(path: Path) -> str | None:
    text = _read(path)
    return None if text is None else text.strip()
