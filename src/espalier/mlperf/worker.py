"""One run of LoadGen in a process of its own: ``python -m espalier.mlperf.worker JOB.json``.

LoadGen keeps state that a second run in the same process would inherit. This module needs NumPy, LoadGen and the
engine, and no tokenizer, so that it also runs in the environments of other engines.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from espalier._network import read_token
from espalier.errors import EspalierError, RulesError
from espalier.mlperf.engines import EngineSettings, open_engine
from espalier.mlperf.features import Samples
from espalier.mlperf.loadgen import import_loadgen
from espalier.mlperf.sut import Direct, Scheduled, SystemUnderTest
from espalier.mlperf.system import describe_machine
from espalier.mlperf.watch import ClockWatch, Energy
from espalier.pipelines import Embeddings, Pipeline, QuestionAnswering
from espalier.scheduler import Limits

_WARM_SAMPLES = 64
"""Samples whose lengths stand for all in a warm-up."""

REPORT, TIMES, PROBE = "worker.json", "times.npy", "probe.json"

PIPELINES: dict[str, type[Pipeline]] = {"squad": QuestionAnswering, "pairs": Embeddings}
"""What understands a model's outputs, by the name of the library of samples."""

MODES = {"performance": "PerformanceOnly", "accuracy": "AccuracyOnly", "find-peak": "FindPeakPerformance"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run depends on. Paths are absolute.

    ``mode``: performance, accuracy, find-peak, or probe, which times the engine for ``probe_s`` seconds without
    LoadGen. ``network``: addresses of nodes that run in the engine's place. ``audit``: lines of an audit.config.
    ``seeds``: those of the round.
    """

    engine: str
    model: str
    library: str
    settings: dict[str, Any]
    samples: str
    scenario: str
    mode: str
    loadgen_model: str
    out: str
    user_conf: str = ""
    audit: str = ""
    seeds: dict[str, int] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    probe_s: float = 8.0
    network: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Run a job; 0 when it ran to its end, whatever the result."""
    _die_with_parent()
    job = Job(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    out = Path(job.out)
    report: dict[str, Any] = {"ok": False, "failures": [], "error": None}
    try:
        samples = Samples.load(Path(job.samples))
        start = time.perf_counter()
        engine = _open(job)
        report["load_s"] = time.perf_counter() - start
        engine.warm_up([samples[i] for i in range(0, len(samples), -(-len(samples) // _WARM_SAMPLES))])
        report["versions"] = {job.engine: engine.version, "python": sys.version.split()[0], "numpy": np.__version__}
        report["machines"] = [asdict(machine) for machine in engine.machines]
        if job.network:
            report["loadgen_machine"] = asdict(describe_machine())
        if job.mode == "probe":
            (out / PROBE).write_text(json.dumps(probe(engine, samples, job)), encoding="utf-8")
        else:
            report.update(run(engine, samples, job))
        report["ok"] = True
    except EspalierError as error:
        report["error"] = str(error)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its answer, told to the parent
        report["error"] = f"{type(error).__name__}: {error}"
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["ok"] else 1


def _open(job: Job) -> Any:
    """The engine, or the nodes in its place."""
    if job.network:
        from espalier.mlperf.network.qdl import RemoteEngine

        return RemoteEngine(job.network, read_token(None))
    return open_engine(job.engine, Path(job.model), PIPELINES[job.library], EngineSettings.from_dict(job.settings))


def _die_with_parent() -> None:
    """A run that nobody waits for would only disturb the next one. Linux only; elsewhere the parent sees to it."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def make_sut(engine: Any, samples: Samples, job: Job, loadgen: Any) -> SystemUnderTest:
    """The system under test that suits the scenario."""
    if job.network:
        from espalier.mlperf.network.qdl import QueryDispatch

        return QueryDispatch(job.network, read_token(None), samples, loadgen)
    if job.scenario.endswith("Stream"):
        return Direct(engine, samples, loadgen)
    return Scheduled(
        engine,
        samples,
        loadgen,
        limits=Limits(**job.limits),
        by_length=job.scenario == "Offline" and engine.settings.padding == "longest",
    )


def run(engine: Any, samples: Samples, job: Job) -> dict[str, Any]:
    """Let LoadGen run its test. Returns what the report says of it."""
    loadgen = import_loadgen()
    out = Path(job.out)
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, job.scenario)
    settings.mode = getattr(loadgen.TestMode, MODES[job.mode])
    # 1: a submitter's configuration on top of LoadGen's own. It can fail without a word.
    if settings.FromConfig(job.user_conf, job.loadgen_model, job.scenario, 1) != 0:
        raise RulesError(f"LoadGen cannot read its configuration {job.user_conf}")
    for name, seed in job.seeds.items():
        setattr(settings, name, seed)
    audit = out / "audit.config"
    if job.audit:
        audit.write_text(job.audit, encoding="utf-8")
    sut = make_sut(engine, samples, job, loadgen)
    handle = sut.construct(loadgen)
    library = loadgen.ConstructQSL(len(samples), len(samples), lambda _: None, lambda _: None)
    energy, start = Energy(), time.perf_counter()
    with ClockWatch() as clock:
        loadgen.StartTestWithLogSettings(handle, library, settings, _log_settings(loadgen, out), str(audit))
    seconds = time.perf_counter() - start
    sut.close()
    loadgen.DestroyQSL(library)
    sut.destroy(loadgen, handle)
    np.save(out / TIMES, sut.times())
    return {
        "failures": sut.failures[:20],
        "failed": len(sut.failures),
        "clock_steps": clock.steps,
        "seconds": seconds,
        "joules": energy.joules(),
    }


def _log_settings(loadgen: Any, out: Path) -> Any:
    settings = loadgen.LogSettings()
    settings.log_output.outdir = str(out)
    settings.log_output.copy_summary_to_stdout = False
    settings.enable_trace = False
    return settings


def probe(engine: Any, samples: Samples, job: Job) -> dict[str, Any]:
    """Seconds of queries of 1 and of 8 samples (median, 90th percentile), and samples per second in large batches."""
    order = np.random.default_rng(0).permutation(len(samples))
    found: dict[str, Any] = {}
    for size in (1, 8):
        times = _timed(engine, samples, order, size, job.probe_s / 4)
        found[f"latency_{size}"] = [float(np.percentile(times, q)) for q in (50, 90)]
    size = max(8, min(len(samples), int(job.probe_s / 4 / found["latency_8"][0] * 8)))
    times = _timed(engine, samples, order, size, job.probe_s / 2)
    found["samples_per_s"] = size * len(times) / sum(times)
    return found


def _timed(engine: Any, samples: Samples, order: np.ndarray, size: int, seconds: float) -> list[float]:
    times: list[float] = []
    at = 0
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        features = [samples[int(i)] for i in order[np.arange(at, at + size) % len(order)]]
        at += size
        start = time.perf_counter()
        engine.run(features)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
