"""The folder of results: a folder per system, in it one per scenario, in it one per step, whole or not at all.

results/
  SYSTEM/
    system.json                    what was measured: model, engine, machine, settings
    SCENARIO/STEP/step.json        whether the step counts, and why not
    SCENARIO/STEP/mlperf_log_*     as LoadGen wrote them
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier.errors import DataError, RulesError
from espalier.files import replacing

SYSTEM, STEP = "system.json", "step.json"
FREE_BYTES = 500_000_000
"""Least free space before a run begins: logs that end in the middle are worth nothing."""


@dataclass(frozen=True)
class Step:
    """A step's outcome. ``problems`` say why it does not count, ``deviations`` where it is less than a full run."""

    scenario: str
    name: str
    problems: list[str]
    deviations: list[str]
    model_digest: str
    figures: dict[str, Any] = field(default_factory=dict)
    finished: str = ""

    @property
    def valid(self) -> bool:
        """Whether it counts at all."""
        return not self.problems

    @property
    def conforming(self) -> bool:
        """Whether it counts as a run under the full rules."""
        return self.valid and not self.deviations


@dataclass(frozen=True)
class System:
    """One folder of results."""

    folder: Path
    about: dict[str, Any]
    steps: dict[tuple[str, str], Step]

    @property
    def name(self) -> str:
        """The folder's name, which is the system's in a submission."""
        return self.folder.name

    def step(self, scenario: str, name: str) -> Step | None:
        """The outcome of a step, None when it was never finished."""
        return self.steps.get((scenario, name))

    @property
    def scenarios(self) -> list[str]:
        """The scenarios with any step."""
        return list(dict.fromkeys(scenario for scenario, _ in self.steps))


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours. Raises DataError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}; remove its folder to measure again") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def read_step(folder: Path) -> Step | None:
    """The outcome in a step's folder, None when there is none."""
    path = folder / STEP
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        return Step(**content)
    except TypeError as error:
        raise DataError(f"{path}: not the outcome of a step: {error}; remove its folder to measure again") from error


def read_system(folder: Path) -> System:
    """Everything in a system's folder. Raises DataError when it is none, or damaged."""
    if not (folder / SYSTEM).is_file():
        raise DataError(f"{folder}: there is no {SYSTEM} in it; expected a folder that espalier mlperf run made")
    from espalier.mlperf.benchmarks import SCENARIOS

    steps: dict[tuple[str, str], Step] = {}
    for scenario in SCENARIOS:
        for path in sorted((folder / scenario).glob(f"*/{STEP}")):
            step = read_step(path.parent)
            if step is not None and path.parent.name == step.name:
                steps[scenario, step.name] = step
    return System(folder, read_json(folder / SYSTEM), steps)


def read_results(folder: Path) -> list[System]:
    """Every system in a folder of results, or the one that the folder is. Raises DataError when there is none."""
    if (folder / SYSTEM).is_file():
        return [read_system(folder)]
    found = [read_system(path.parent) for path in sorted(folder.glob(f"*/{SYSTEM}"))]
    if not found:
        raise DataError(f"{folder}: no results in it; make some with espalier mlperf run MODEL -o {folder}")
    return found


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill, which :func:`keep` puts into place; removed if that never happens.

    Raises RulesError when the disc is nearly full.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < FREE_BYTES:
        temporary.rmdir()
        raise RulesError(
            f"{folder}: {free / 1e6:.0f} MB are free, a run wants {FREE_BYTES / 1e6:.0f} MB for its logs; make room "
            "and run again, what is finished stays"
        )
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep(temporary: Path, folder: Path, step: Step) -> Path:
    """Write the outcome and put the folder into place; returns where.

    An outcome that does not count never takes the place of one that does: it goes beside it, as ``STEP.invalid``.
    """
    earlier = read_step(folder)
    if not step.valid and earlier is not None and earlier.valid:
        folder = folder.with_name(f"{folder.name}.invalid")
    write_json(temporary / STEP, asdict(step))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def same_system(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what is measured, or compare it with what the folder says. Raises RulesError when they differ."""
    path = folder / SYSTEM
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
        return
    before = read_json(path)
    changed = [key for key in about["identity"] if before.get("identity", {}).get(key) != about["identity"][key]]
    if changed:
        key = changed[0]
        raise RulesError(
            f"{folder} holds results of another system: {', '.join(changed)} changed ({key} was "
            f"{before.get('identity', {}).get(key)!r}, is {about['identity'][key]!r}); give another --name, or --fresh "
            "to measure all of it again"
        )
