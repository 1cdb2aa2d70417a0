"""Cores from made-up cgroup files."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from espalier import _cpu

MOUNT_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("50000 100000\n", 0.5),
        ("200000", 2.0),
        ("", None),
        ("words here", None),
        ("100000 0", None),
        ("-1 100000", None),
    ],
)
def test_cpu_max(text: str, cores: float | None) -> None:
    assert _cpu.parse_cpu_max(text) == cores


def test_cgroup_lines() -> None:
    groups = _cpu.parse_cgroups("3:cpu,cpuacct:/docker/a:b\n1:name=systemd:/\n0::/user.slice/x\nrubbish\n")
    assert groups["cpu"] == groups["cpuacct"] == PurePosixPath("/docker/a:b")
    assert groups[""] == PurePosixPath("/user.slice/x")
    assert _cpu.parse_cgroups("") == {}


def test_mount_lines() -> None:
    other = "22 27 0:21 / /proc rw,relatime - proc proc rw\nrubbish\n"
    mounts = _cpu.parse_mounts(MOUNT_V2 + other + MOUNT_V1)
    assert [mount.kind for mount in mounts] == ["cgroup2", "cgroup"]
    assert mounts[1].point == PurePosixPath("/sys/fs/cgroup/cpu,cpuacct")
    assert "cpu" in mounts[1].controllers


def test_version_2_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": MOUNT_V2,
        "sys/fs/cgroup/a/cpu.max": "250000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000",
    }
    assert _cpu.cgroup_quota(write(tmp_path, files)) == 2.5


def test_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "2:cpu,cpuacct:/docker/x\n1:memory:/\n",
        "proc/self/mountinfo": MOUNT_V1.replace("0:29 /", "0:29 /docker/x", 1),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert _cpu.cgroup_quota(write(tmp_path, files)) == 0.5
    assert _cpu.usable_cores(tmp_path) == 1


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "2:cpu:/\n",
        "proc/self/mountinfo": MOUNT_V1,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert _cpu.cgroup_quota(write(tmp_path, files)) is None


def test_nothing_there(tmp_path: Path) -> None:
    assert _cpu.cgroup_quota(tmp_path) is None
    assert _cpu.usable_cores(tmp_path) >= 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_affinity_and_quota_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": MOUNT_V2,
        "sys/fs/cgroup/cpu.max": "250000 100000",
    }
    assert _cpu.usable_cores(tmp_path) == 8
    assert _cpu.usable_cores(write(tmp_path, files)) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert _cpu.usable_cores(tmp_path) == 1
