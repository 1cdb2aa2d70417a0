"""Which format and kernel each weight gets: the cost model's choice, or the fastest of its candidates by measurement.

Measurements are kept per machine in the user's cache folder, so that a model is tuned once.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from espalier._native import SparseMatrix

CACHE_VERSION = 1
_WORTH_MEASURING = 1.8
"""Candidates whose estimate exceeds the best one's by this factor are not measured."""
_MOST_MEASURED = 4


@dataclass(frozen=True)
class Choice:
    """A weight format (``dense``, ``unstructured`` or ``4x1``) and its chunk of columns."""

    format: str
    chunk: int
    measured: bool


class Tuner:
    """Chooses formats for one instruction set; ``tune=False`` trusts the cost model."""

    def __init__(self, isa: str, *, tune: bool, cache: Path | None = None) -> None:
        self.isa = isa
        self.tune = tune
        self._path = cache if cache is not None else cache_folder() / "tuning.json"
        self._known: dict[str, list[str | int]] = self._read() if tune else {}
        self._changed = False

    def choose(self, matrix: SparseMatrix) -> Choice:
        """The format for ``matrix``. With tuning, the measured fastest among the promising ones."""
        ranked = matrix.candidates(self.isa)
        if not self.tune:
            return Choice(ranked[0][0], ranked[0][1], measured=False)
        key = self._key(matrix)
        known = self._known.get(key)
        for name, chunk, _ in ranked:
            if known == [name, chunk]:
                return Choice(name, chunk, measured=True)
        name, chunk = self._measure(matrix, ranked)
        self._known[key] = [name, chunk]
        self._changed = True
        return Choice(name, chunk, measured=True)

    def save(self) -> None:
        """Write new measurements to the cache. A cache that cannot be written is no error: it is only slower."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = self._read_file() | {self._machine(): self._known}
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({"version": CACHE_VERSION, "machines": content}, file)
            os.replace(file.name, self._path)
        except OSError:
            return

    def _measure(self, matrix: SparseMatrix, ranked: list[tuple[str, int, float]]) -> tuple[str, int]:
        from espalier import _native

        limit = ranked[0][2] * _WORTH_MEASURING
        worthwhile = [(name, chunk) for name, chunk, cycles in ranked if cycles <= limit][:_MOST_MEASURED]
        weights = [_native.Weight(matrix, name, chunk, self.isa) for name, chunk in worthwhile]
        best = [math.inf] * len(weights)
        for _ in range(2):  # in turn, so that a drift of the clock hits all alike
            for index, weight in enumerate(weights):
                best[index] = min(best[index], weight.time(self.isa))
        return worthwhile[best.index(min(best))]

    def _key(self, matrix: SparseMatrix) -> str:
        """Shape, and zeros to within a few per cent: weights that close perform alike."""

        def bin_of(count: int) -> int:
            return round(math.log(count + 1) / math.log(1.04))

        return f"{matrix.rows}x{matrix.columns}/{bin_of(matrix.nonzeros)}/{bin_of(matrix.blocks4x1)}"

    def _machine(self) -> str:
        from espalier import _native

        model = platform.processor() or platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            fields = [
                line.partition(":")[2].strip()
                for line in lines
                if line.startswith(("model name", "model\t", "stepping"))
            ]
            model = " ".join(fields[:3]) or model
        except OSError:
            pass
        return f"{model} {self.isa} {_native.panel_shape(self.isa)}"

    def _read_file(self) -> dict[str, dict[str, list[str | int]]]:
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict) or content.get("version") != CACHE_VERSION:
            return {}
        machines = content.get("machines")
        return machines if isinstance(machines, dict) else {}

    def _read(self) -> dict[str, list[str | int]]:
        known = self._read_file().get(self._machine())
        return known if isinstance(known, dict) else {}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/espalier``, or ``~/.cache/espalier``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "espalier"
