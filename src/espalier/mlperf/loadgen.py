"""What the rest needs to know of LoadGen: its import, its configuration, and the logs it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier.errors import DataError, MissingDependencyError, RulesError

SUMMARY, DETAIL, ACCURACY = "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"
_MARK = ":::MLLOG"

METRICS = {
    "SingleStream": "early_stopping_latency_ss",
    "MultiStream": "early_stopping_latency_ms",
    "Server": "result_completed_samples_per_sec",
    "Offline": "result_samples_per_second",
}
"""The key of each scenario's metric in the detail log, as the submission checker reads it."""


def import_loadgen() -> Any:
    """The module ``mlperf_loadgen``. Raises MissingDependencyError."""
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MissingDependencyError(
            f"MLPerf's load generator cannot be imported ({error}); run: pip install 'espalier[bench]'"
        ) from error
    return mlperf_loadgen


@dataclass(frozen=True)
class UserConf:
    """The file in which LoadGen reads what a submitter may set. Keys are LoadGen's, durations milliseconds."""

    scenario: str
    values: Mapping[str, float]

    @property
    def text(self) -> str:
        """The file's content."""
        lines = [f"*.{self.scenario}.{key} = {_number(value)}" for key, value in self.values.items()]
        return "\n".join(["# Written by espalier mlperf. Everything else is LoadGen's own default.", *lines, ""])


def _number(value: float) -> str:
    # LoadGen reads plain numbers only.
    return str(int(value)) if float(value).is_integer() else f"{value:.6f}"


class DetailLog:
    """``mlperf_log_detail.txt``: ``log[key]`` is the first value of a key, None where there is none."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file is missing, cut off or not such a log."""
        self.values: dict[str, Any] = {}
        self.errors: list[str] = []
        self.messages: list[str] = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: LoadGen's log cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.startswith(_MARK):
                continue
            try:
                entry = json.loads(line[len(_MARK) :])
                self.values.setdefault(entry["key"], entry["value"])
                if entry["key"] == "generic_message":
                    self.messages.append(str(entry["value"]))
                if entry["metadata"]["is_error"]:
                    self.errors.append(str(entry["value"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: not a line of LoadGen's log, it may be cut off: {error}") from error
        if not self.values:
            raise DataError(f"{path}: there is no entry of LoadGen's in it")

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def scenario(self) -> str:
        """The scenario in MLPerf's spelling."""
        return str(self["effective_scenario"]).replace(" ", "")

    @property
    def metric(self) -> float | None:
        """The scenario's metric: nanoseconds for the streams, samples per second otherwise; None without a result."""
        value = self[METRICS[self.scenario]]
        return None if value is None else float(value)

    @property
    def early_stopping(self) -> str:
        """What LoadGen's early stopping says about the number of queries, in one line; times are nanoseconds."""
        points = str(self["early_stopping_result"] or "").split("*")
        return "; ".join(" ".join(point.split()).rstrip(".") for point in points if point.strip())

    @property
    def peak(self) -> str | None:
        """What LoadGen's search for the peak found, such as ``target_qps: 120``; None when it found none."""
        mark = "Found peak performance field: "
        return next((text.partition(mark)[2] for text in self.messages if mark in text), None)

    def latency(self, percentile: str) -> float | None:
        """A percentile such as ``"99.00"`` of the latency of queries, in nanoseconds."""
        stream = "per_query_" if self.scenario == "MultiStream" else ""
        value = self[f"result_{percentile}_percentile_{stream}latency_ns"]
        return None if value is None else float(value)


def read_answers(path: Path) -> Iterator[tuple[int, bytes]]:
    """``(sample, data)`` of every entry of ``mlperf_log_accuracy.json``. Raises DataError when it is not one."""
    try:
        entries = json.loads(path.read_text(encoding="ascii"))
        for entry in entries:
            yield int(entry["qsl_idx"]), bytes.fromhex(entry["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a complete accuracy log of LoadGen's: {error}") from error


def complete_answers(path: Path, count: int) -> dict[int, np.ndarray]:
    """The answers of an accuracy run over ``count`` samples, as float32 arrays by sample.

    LoadGen repeats samples to fill its last query; the first answer to each counts. Raises RulesError when a sample is
    missing, or an answer is empty or not finite.
    """
    found: dict[int, np.ndarray] = {}
    bad = 0
    for sample, data in read_answers(path):
        if sample in found:
            continue
        found[sample] = np.frombuffer(data, np.float32) if len(data) % 4 == 0 else np.zeros(0, np.float32)
        bad += found[sample].size == 0 or not bool(np.isfinite(found[sample]).all())
    missing = count - len(found)
    if missing:
        raise RulesError(f"the accuracy run answered {len(found)} of {count} samples; it must answer every one")
    if bad:
        raise RulesError(f"{bad} of {count} answers of the accuracy run are empty or not finite numbers")
    return found
