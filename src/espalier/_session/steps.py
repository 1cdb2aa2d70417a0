"""The steps of a session, ready to run: one small interface over the native engine and ONNX Runtime."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from espalier._session.build import build
from espalier._session.checks import ValueCheck, value_checks
from espalier.compiler.packed import PackedProgram
from espalier.errors import EngineError
from espalier.loading import LoadSettings
from espalier.ort import OrtProgram
from espalier.passes.partition import NativeSegment, OrtSegment, Step


class Clock:
    """Calls and seconds spent, from any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls = 0
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one call."""
        with self._lock:
            self.calls += 1
            self.seconds += seconds

    @property
    def mean_ms(self) -> float | None:
        """Milliseconds per call, None before the first."""
        with self._lock:
            return self.seconds / self.calls * 1e3 if self.calls else None


class NativeStep:
    """A native segment: its program and the checks its inputs need first."""

    def __init__(self, segment: NativeSegment, program: PackedProgram) -> None:
        # Without its constants: the program has packed them.
        self.segment = replace(segment, graph=replace(segment.graph, constants={}))
        self.program = program
        self.inputs = segment.graph.inputs
        self.outputs = segment.graph.outputs
        self.checks: list[ValueCheck] = value_checks(segment.graph)
        self.clock = Clock()

    def check(self, values: Mapping[str, np.ndarray], names: set[str] | None = None) -> None:
        """Run the value checks, those on ``names`` only when given. Raises InputShapeError, MaskValueError."""
        for check in self.checks:
            if names is None or check.name in names:
                check(values[check.name])

    def check_rows(self, rows: Sequence[Mapping[str, np.ndarray]]) -> None:
        """The value checks over ragged rows, each input's rows at once. Raises as :meth:`check`."""
        for check in self.checks:
            arrays = [row[check.name] for row in rows]
            if check.kind in ("ids", "mask"):
                check(np.concatenate(arrays))
            elif check.kind == "columns":
                check(max(arrays, key=len))
            else:
                for array in arrays:
                    check(array)

    def run(self, values: Mapping[str, Any], run_options: Any = None) -> dict[str, Any]:
        """The segment's outputs by name. ``run_options`` are ONNX Runtime's and do not concern the engine."""
        feeds = {name: np.ascontiguousarray(values[name]) for name in self.inputs}
        start = time.perf_counter()
        results = self.program.run(feeds)
        self.clock.add(time.perf_counter() - start)
        missing = [name for name in self.outputs if name not in results]
        if missing:
            raise EngineError(f"the engine returned {sorted(results)} and not {missing[0]!r}; please report this")
        return results

    def run_ragged(self, feeds: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
        """As ``run``, one array per sequence."""
        start = time.perf_counter()
        results = self.program.run_ragged({name: feeds[name] for name in self.inputs})
        self.clock.add(time.perf_counter() - start)
        return results


class OrtStep:
    """A foreign segment, or a whole model, in ONNX Runtime."""

    def __init__(self, segment: OrtSegment, program: OrtProgram) -> None:
        # Without serialised weights: ONNX Runtime has copied them.
        self.segment = replace(segment, model=b"") if isinstance(segment.model, bytes) else segment
        self.program = program
        self.inputs = segment.inputs
        self.outputs = segment.outputs
        self.clock = Clock()

    def run(self, values: Mapping[str, Any], run_options: Any = None) -> dict[str, Any]:
        """The segment's outputs by name."""
        results = self.run_list(self.outputs, {name: values[name] for name in self.inputs}, run_options)
        return dict(zip(self.outputs, results, strict=True))

    def run_list(self, names: Sequence[str] | None, feeds: Mapping[str, Any], run_options: Any = None) -> list[Any]:
        """ONNX Runtime's own call, timed."""
        start = time.perf_counter()
        results = self.program.run(names, feeds, run_options)
        self.clock.add(time.perf_counter() - start)
        return results


AnyStep = NativeStep | OrtStep


def prepare(steps: list[Step], settings: LoadSettings) -> list[AnyStep]:
    """Compile native segments and open foreign ones. Raises UnsupportedModelError, ModelError and its like."""
    native = [step for step in steps if isinstance(step, NativeSegment)]
    programs = iter(build(native, settings))
    return [
        NativeStep(step, next(programs))
        if isinstance(step, NativeSegment)
        else OrtStep(step, OrtProgram(step.model, threads=settings.thread_count, shared=bool(native)))
        for step in steps
    ]
