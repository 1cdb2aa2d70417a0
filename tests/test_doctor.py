"""What the doctor makes of machines that are not this one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from espalier import doctor
from espalier.doctor import Cache, Cpu, Engine, Limits

CPU = Cpu("A CPU", "x86_64", 8, 4, ("avx2", "fma"), (Cache(1, "Data", 32768, 2),), None, 0.5)
LIMITS = Limits(8, None, 8)
ENGINE = Engine(True, "avx2", ("avx2",), None, "")


def said(cpu: Cpu = CPU, limits: Limits = LIMITS, engine: Engine = ENGINE) -> str:
    return "\n".join(f"{f.kind}: {f.what}; {f.remedy}" for f in doctor.findings(cpu, limits, engine))


def test_a_good_machine_has_nothing_to_say() -> None:
    assert said(dataclasses.replace(CPU, physical=8)) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "8 usable CPUs are 4 physical cores"),
        ({"limits": Limits(8, 1.5, 2)}, "quota allows 1.5 of 8 CPUs"),
        ({"limits": Limits(2, None, 2)}, "may run on 2 of 8 CPUs"),
        ({"engine": Engine(True, "scalar", (), None, "")}, "neither AVX2 with FMA nor NEON"),
        ({"engine": Engine(True, "scalar", ("avx2",), "scalar", "")}, "ESPALIER_MAX_ISA is set"),
        ({"engine": Engine(True, "avx2", ("avx2", "avx512"), "avx2", "")}, "caps the kernels at avx2"),
        ({"engine": Engine(False, None, (), None, "no such file")}, "broken: no such file; install a wheel"),
        ({"engine": Engine(False, None, (), "sse9", "unknown")}, "broken: unknown; correct ESPALIER_MAX_ISA"),
        ({"cpu": dataclasses.replace(CPU, flags=("avx2", "amx_int8"))}, "does not let this process use its tile"),
        ({"cpu": dataclasses.replace(CPU, governor="powersave")}, "governor is powersave"),
        ({"cpu": dataclasses.replace(CPU, load=9.5)}, "load 9.5 on 8 CPUs"),
    ],
)
def test_findings(change: dict[str, object], words: str) -> None:
    assert words in said(**change)  # type: ignore[arg-type]


CPUINFO = """processor\t: {n}
model name\t: Made-up 9000
physical id\t: 0
siblings\t: 4
core id\t\t: {core}
flags\t\t: fpu avx2 fma avx512f something

"""


def test_the_cpu_of_a_made_up_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    text = "".join(CPUINFO.format(n=n, core=n // 2) for n in range(4))
    (tmp_path / "proc/cpuinfo").write_text(text)
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache/index0"
    cache.mkdir(parents=True)
    for name, value in {"level": "3", "type": "Unified", "size": "36M", "shared_cpu_list": "0-2,8"}.items():
        (cache / name).write_text(f"{value}\n")
    cpu = doctor.cpu(tmp_path)
    assert cpu.model == "Made-up 9000"
    assert cpu.physical == 2
    assert cpu.flags == ("fma", "avx2", "avx512f")
    assert cpu.caches == (Cache(3, "Unified", 36 << 20, 4),)


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    cpu = doctor.cpu(tmp_path)
    assert cpu.physical is None
    assert cpu.caches == ()
    assert cpu.flags == ()


def test_required_packages_are_listed_with_their_versions() -> None:
    assert {"espalier", "numpy", "onnx", "onnxruntime", "safetensors"} <= set(doctor.installed())
