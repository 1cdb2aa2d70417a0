"""How many cores this process may use: CPU affinity and the quotas of cgroup versions 1 and 2."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Mount(NamedTuple):
    """One cgroup line of ``/proc/self/mountinfo``."""

    root: PurePosixPath
    point: PurePosixPath
    kind: str
    controllers: frozenset[str]


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use, at least 1: the smaller of its affinity and its cgroup quota, rounded up.

    ``root`` stands for the file system's root; tests point it at a folder of made-up files.
    """
    cores = _affinity()
    quota = cgroup_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Cores that the tightest cgroup above this process allows, or None where nothing limits it."""
    groups = parse_cgroups(_read(root / "proc/self/cgroup") or "")
    mounts = parse_mounts(_read(root / "proc/self/mountinfo") or "")
    limits: list[float] = []
    for mount in mounts:
        if mount.kind == "cgroup2":
            path, read_limit = groups.get(""), _limit_v2
        elif "cpu" in mount.controllers:
            path, read_limit = groups.get("cpu"), _limit_v1
        else:
            continue
        if path is None:
            continue
        for folder in _ancestors(path, mount):
            limit = read_limit(root / str(folder).lstrip("/"))
            if limit is not None:
                limits.append(limit)
    return min(limits, default=None)


def parse_cgroups(text: str) -> dict[str, PurePosixPath]:
    """``/proc/self/cgroup``: the group path by controller; version 2's one group is under ``""``."""
    groups: dict[str, PurePosixPath] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and path.startswith("/"):
            for controller in controllers.split(","):
                groups[controller] = PurePosixPath(path)
    return groups


def parse_mounts(text: str) -> list[Mount]:
    """The cgroup mounts in ``/proc/self/mountinfo``."""
    mounts: list[Mount] = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if dash and len(fields) >= 5 and len(tail) >= 3 and tail[0] in ("cgroup", "cgroup2"):
            root, point = (PurePosixPath(_unescape(field)) for field in fields[3:5])
            mounts.append(Mount(root, point, tail[0], frozenset(tail[2].split(","))))
    return mounts


def parse_cpu_max(text: str) -> float | None:
    """Version 2's ``cpu.max`` ("max 100000" or "150000 100000", microseconds): cores, or None without a limit."""
    fields = text.split()
    if not fields or fields[0] == "max":
        return None
    return _cores(fields[0], fields[1] if len(fields) > 1 else "100000")


def _cores(quota: str, period: str) -> float | None:
    try:
        quota_us, period_us = int(quota), int(period)
    except ValueError:
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _limit_v2(folder: Path) -> float | None:
    text = _read(folder / "cpu.max")
    return None if text is None else parse_cpu_max(text)


def _limit_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return None if quota is None or period is None else _cores(quota.strip(), period.strip())


def _ancestors(group: PurePosixPath, mount: Mount) -> Iterator[PurePosixPath]:
    """The group's folder under the mount and every folder above it: a parent's quota binds its children too."""
    # Inside a container the mount shows a subtree of the hierarchy (its root), or the group is outside of it.
    relative = group.relative_to(mount.root) if group.is_relative_to(mount.root) else PurePosixPath()
    folder = mount.point / relative
    while folder != mount.point:
        yield folder
        folder = folder.parent
    yield mount.point


def _unescape(field: str) -> str:
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
