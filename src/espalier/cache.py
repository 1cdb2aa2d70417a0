"""Measurements on this machine, remembered in the user's cache folder so that each is made once."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any


class MachineCache:
    """Measurements by name, in a JSON file that holds those of other machines beside them.

    ``path``: the file. ``version``: a file of another version counts as empty. ``isa``: the instruction set measured
    with; each has measurements of its own. What :attr:`known` holds is up to its user, who also checks what it reads:
    the file may be anybody's.
    """

    def __init__(self, path: Path, version: int, isa: str) -> None:
        self._path = path
        self._version = version
        self._machine = _machine(isa)
        self.known: dict[str, Any] = self._own(self._read())

    def save(self) -> None:
        """Write :attr:`known`. A cache that cannot be written is no error: the next run measures again."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            machines = self._read()
            machines[self._machine] = self._own(machines) | self.known
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({"version": self._version, "machines": machines}, file)
            os.replace(file.name, self._path)
        except OSError:
            return

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("version") != self._version:
            return {}
        machines = content.get("machines")
        return machines if isinstance(machines, dict) else {}

    def _own(self, machines: dict[str, Any]) -> dict[str, Any]:
        own = machines.get(self._machine)
        return own if isinstance(own, dict) else {}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/espalier``, or ``~/.cache/espalier``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "espalier"


def _machine(isa: str) -> str:
    """The processor's model and stepping, the instruction set and its panels."""
    from espalier import _native

    return f"{_processor()} {isa} {_native.panel_shape(isa)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "model\t", "stepping"))]
    return " ".join(named[:3]) or platform.processor() or platform.machine()
