"""The verb ``run``: every step of a benchmark, each in a process of its own, and only those not finished yet."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import espalier
from espalier.errors import EspalierError, InputError, ModelNotFoundError, RulesError
from espalier.loading import LoadSettings
from espalier.mlperf import compliance, gate, results
from espalier.mlperf.benchmarks import Benchmark, find
from espalier.mlperf.engines import EngineSettings, find_engine
from espalier.mlperf.library import Library, read_library, sha256
from espalier.mlperf.loadgen import ACCURACY, DETAIL, DetailLog, UserConf, complete_answers, import_loadgen
from espalier.mlperf.results import Step
from espalier.mlperf.rounds import find_round
from espalier.mlperf.search import find_rate
from espalier.mlperf.worker import PROBE, REPORT, Job

FASTEST = 150_000.0
"""Queries per second at most: what LoadGen and callbacks in Python can do. LoadGen generates queries beforehand, for as
many as the engine is said to answer."""
_MOST_ATTEMPTS = 5
_TOO_LITTLE = ("LoadGen: Result", "LoadGen: Ending early: Ran out of generated queries")
"""How LoadGen says that it had expected something else of the engine."""
_SERVER_QUERIES = 700
_MODES = ("performance", "accuracy", "find-peak")
_LOG = "worker.log"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. ``quick``: seconds of a performance run instead of the rules' 600, None for those.

    ``padding`` and ``batch`` are for engines that need them; ``server_qps`` skips the search for the Server's rate.
    ``network``: addresses of nodes (``espalier mlperf node``) that run the model in place of this machine.
    ``python``: the interpreter of another environment, for its engine. ``audits``: compliance tests to run too.
    ``load``: how to load the model; engines other than Espalier's only take its threads.
    """

    benchmark: str
    data: Path
    out: Path
    scenarios: tuple[str, ...] = ("Offline", "SingleStream")
    modes: tuple[str, ...] = ("performance", "accuracy")
    audits: tuple[str, ...] = ()
    engine: str = "espalier"
    python: Path | None = None
    tokenizer: Path | None = None
    name: str | None = None
    note: str = ""
    load: LoadSettings = field(default_factory=LoadSettings)
    padding: str | None = None
    batch: int = 16
    quick: float | None = None
    server_qps: float | None = None
    latency_ms: float | None = None
    fresh: bool = False
    division: str = "open"
    category: str = "edge"
    network: tuple[str, ...] = ()
    round: str = "v6.1"

    def __post_init__(self) -> None:
        if self.load.is_gpu and self.engine != "espalier":
            raise InputError(f"the engine {self.engine} runs on the CPU here; leave out device {self.load.device!r}")
        if self.network and self.engine != "espalier":
            raise InputError(f"nodes run the engine espalier; {self.engine} cannot be measured over the network")
        if self.load.is_gpu and self.network:
            raise InputError(
                f"nodes run the model, each where it was told to: leave out device {self.load.device!r} here, and give "
                "it to espalier mlperf node"
            )
        unknown = [mode for mode in self.modes if mode not in _MODES]
        if unknown:
            raise InputError(f"unknown mode {', '.join(unknown)}; known: {', '.join(_MODES)}")
        if self.quick is not None and self.quick <= 0:
            raise InputError(f"quick must be a positive number of seconds; got {self.quick}")


Tell = Callable[[str], None]


def run(model: Path, settings: Settings, *, tell: Tell | None = None) -> results.System:
    """Measure ``model``; returns all there is in its folder of results. ``tell`` gets a line about each step.

    Steps that are finished and count are not repeated, so that an interrupted run goes on where it stopped. Raises
    DataError, RulesError, ModelError, InputError or MissingDependencyError before anything runs; a step that fails is
    recorded with its reason, and the others go on.
    """
    runner = Runner(model, settings, tell or (lambda _: None))
    runner.prepare()
    for scenario in settings.scenarios:
        runner.measure(scenario)
    return results.read_system(runner.folder)


class Runner:
    """One call of :func:`run`."""

    def __init__(self, model: Path, settings: Settings, tell: Tell) -> None:
        self.settings = settings
        self.benchmark: Benchmark = find(settings.benchmark)
        self.round = find_round(settings.round)
        self.engine = find_engine(settings.engine)
        padding = settings.padding or self.engine.paddings[0]
        if padding not in self.engine.paddings:
            raise InputError(
                f"the engine {settings.engine} has no padding {padding!r}; it has {', '.join(self.engine.paddings)}"
            )
        if not model.exists():
            raise ModelNotFoundError(f"{model} does not exist; give a model file or folder")
        self.padding = padding
        self.model = model.resolve()
        self.folder = settings.out / (settings.name or _system_name(model, settings, padding))
        self._tell = tell
        self._work = self.folder / "work"
        self.library: Library
        self.digest = ""

    # --- preparation --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read the data, describe the system, and write what the worker needs."""
        import_loadgen()
        settings = self.settings
        folder = self.model if self.model.is_dir() else self.model.parent
        self._tell(f"reading {settings.data}")
        self.library = read_library(self.benchmark.library, settings.data, settings.tokenizer or folder)
        expected = self.benchmark.samples
        if expected is not None and len(self.library.samples) != expected:
            raise RulesError(
                f"{self.library.path} makes {len(self.library.samples)} samples, {self.benchmark.name} has {expected}: "
                "give SQuAD v1.1's whole dev set, and the tokenizer of BERT uncased; or use --benchmark custom"
            )
        self.digest = digest(self.model)
        if settings.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        results.same_system(self.folder, self._about())
        self._work.mkdir(exist_ok=True)
        self.library.samples.save(self._work / "samples.npz")
        self._engine_model = _engine_model(self.model, self._work, onnx=self.engine.wants_onnx)

    def _about(self) -> dict[str, Any]:
        from espalier.doctor import machine

        settings, calibration = self.settings, self.settings.load.calibration
        return {
            "identity": {
                "benchmark": self.benchmark.name,
                "data": self.library.digest,
                "model": self.digest,
                "engine": settings.engine,
                "settings": self._engine_settings().to_dict(),
                "round": settings.round,
                "quick": settings.quick,
                "latency_ms": settings.latency_ms,
                **({"calibration": sha256(Path(calibration))} if calibration is not None else {}),
                **({"network": list(settings.network)} if settings.network else {}),
            },
            "title": self.benchmark.title,
            "official": self.benchmark.official,
            "model": self.model.name,
            "model_path": str(self.model),
            "data": self.library.title,
            "samples": len(self.library.samples),
            "mean_tokens": round(float(self.library.samples.lengths.mean()), 2),
            "division": settings.division,
            "category": settings.category,
            "note": settings.note,
            "espalier": espalier.__version__,
            "weights": describe_weights(self.model),
            "machine": machine(),
        }

    def _engine_settings(self) -> EngineSettings:
        load, calibration = self.settings.load, self.settings.load.calibration
        return EngineSettings(
            load=load if calibration is None else replace(load, calibration=Path(calibration).resolve()),
            padding=self.padding,
            batch=self.settings.batch,
            max_length=self.library.max_length,
        )

    def _job(self, scenario: str, mode: str, out: Path, conf: Mapping[str, float]) -> Job:
        settings = self._engine_settings()
        if scenario in ("SingleStream", "MultiStream"):
            settings = replace(settings, batch=1 if scenario == "SingleStream" else min(8, settings.batch))
        path = out / "user.conf"
        path.write_text(UserConf(scenario, conf).text, encoding="utf-8")
        return Job(
            engine=self.settings.engine,
            model=str(self._engine_model),
            library=self.benchmark.library,
            settings=settings.to_dict(),
            samples=str((self._work / "samples.npz").resolve()),
            scenario=scenario,
            mode=mode,
            loadgen_model=self.benchmark.model,
            out=str(out.resolve()),
            user_conf=str(path.resolve()),
            seeds=dict(self.round.seeds),
            limits=self._limits(scenario),
            network=list(self.settings.network),
        )

    def _limits(self, scenario: str) -> dict[str, Any]:
        limits: dict[str, Any] = {"waiting": None}
        if self.padding != "none":
            limits["items"] = self.settings.batch
        if scenario == "Server":
            limits["latency"] = (self.settings.latency_ms or self.benchmark.latency_ms) / 1e3
        return limits

    # --- the steps ----------------------------------------------------------------------------------------------------

    def measure(self, scenario: str) -> None:
        """All steps of a scenario."""
        modes = self.settings.modes
        if "performance" in modes:
            self._step(scenario, "performance", lambda out: self._performance(scenario, out))
        if "accuracy" in modes:
            self._step(scenario, "accuracy", lambda out: self._accuracy(scenario, out))
        for audit in self.settings.audits:
            self._step(scenario, audit, lambda out, audit=audit: self._audit(scenario, audit, out))  # type: ignore[misc]
        if "find-peak" in modes:
            self._step(scenario, "find-peak", lambda out: self._find_peak(scenario, out))

    def _step(self, scenario: str, name: str, body: Callable[[Path], Step]) -> Step:
        """Run a step, unless it is finished and counts. Whatever spoils it becomes its outcome."""
        folder = self.folder / scenario / name
        done = results.read_step(folder)
        if done is not None and done.valid:
            self._tell(f"{scenario} {name}: finished before, {_short(done)}")
            return done
        with results.writing(folder) as out:
            try:
                step = body(out)
                step = replace(step, problems=step.problems + self._changes())
            except KeyboardInterrupt:
                results.keep(out, folder, self._spoiled(scenario, name, "it was interrupted"))
                raise
            except EspalierError as error:
                step = self._spoiled(scenario, name, str(error))
            except OSError as error:
                results.keep(out, folder, self._spoiled(scenario, name, f"{error.strerror or error}"))
                raise
            where = results.keep(out, folder, step)
        self._tell(f"{scenario} {name}: {_short(step)}" + ("" if step.valid else f" ({where})"))
        return step

    def _outcome(self, scenario: str, name: str, **parts: Any) -> Step:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        defaults: dict[str, Any] = {"problems": [], "deviations": []}
        return Step(scenario, name, model_digest=self.digest, finished=now, **{**defaults, **parts})

    def _spoiled(self, scenario: str, name: str, problem: str) -> Step:
        return self._outcome(scenario, name, problems=[problem])

    def _changes(self) -> list[str]:
        if digest(self.model) != self.digest:
            return [f"{self.model} changed while it was measured, so the runs are not of one model"]
        return []

    def _work_on(self, job: Job, out: Path) -> tuple[dict[str, Any], list[str]]:
        """Run a job in its own process: its report, and what spoils it."""
        job.save(out / "job.json")
        code = run_worker(out, self.settings.python)
        if not (out / REPORT).is_file():
            return {}, [f"the process of the run ended with {_exit(code)}: {last_words(out / _LOG)}"]
        report = results.read_json(out / REPORT)
        return report, gate.worker_problems(report)

    def _probe(self) -> dict[str, Any]:
        """Rough speeds of the engine, measured once for the whole system."""
        folder = self.folder / "probe"
        if not (folder / PROBE).is_file():
            self._tell("probing the engine's speed")
            with results.writing(folder) as out:
                job = replace(self._job("Offline", "probe", out, {}), probe_s=min(8.0, self.settings.quick or 8.0))
                _, problems = self._work_on(job, out)
                if problems:
                    raise RulesError(f"the engine cannot be probed: {problems[0]}")
                folder.mkdir(exist_ok=True)
                os.replace(out / PROBE, folder / PROBE)
        found: dict[str, Any] = results.read_json(folder / PROBE)
        return found

    def _fastest(self) -> float:
        """Samples per second that the engine can do in large batches."""
        return min(float(self._probe()["samples_per_s"]), FASTEST)

    def _performance(self, scenario: str, out: Path) -> Step:
        conf = self._expectations(scenario)
        search = None
        if scenario == "Server":
            # With fewer, even a run without a late query is too few to be sure of the 99th percentile.
            conf["min_query_count"] = _SERVER_QUERIES
            rate = self.settings.server_qps
            if rate is None:
                search = self._search_rate(conf)
                rate = search["valid"]
            conf["target_qps"] = rate
        step = self._attempts(scenario, "performance", out, conf)
        return replace(step, figures={**step.figures, "user_conf": conf, "search": search})

    def _attempts(self, scenario: str, name: str, out: Path, conf: dict[str, float], **audit: Any) -> Step:
        """Performance runs until one counts, each with the expectation in ``conf`` corrected by the one before."""
        attempts: list[dict[str, Any]] = []
        for _ in range(_MOST_ATTEMPTS):
            step = self._attempt(scenario, name, out, conf, **audit)
            attempts.append(
                {"expected": _expected(conf), "metric": step.figures.get("metric"), "problems": step.problems}
            )
            if step.valid or not _adjust(scenario, conf, step):
                break
            self._tell(f"{scenario} {name}: {step.problems[0]}; once more with {_expected(conf):.4g}")
        return replace(step, figures={**step.figures, "attempts": attempts})

    def _attempt(self, scenario: str, name: str, out: Path, conf: Mapping[str, float], **audit: Any) -> Step:
        """One performance run."""
        job = replace(self._job(scenario, "performance", out, conf), **audit)
        self._tell(
            f"{scenario} {name}: running for {conf.get('min_duration', gate.MIN_DURATION_MS) / 1000:g} s or more"
        )
        report, problems = self._work_on(job, out)
        if not (out / DETAIL).is_file() or (problems and not report):
            return self._outcome(scenario, name, problems=problems or ["LoadGen left no log"])
        log = DetailLog(out / DETAIL)
        return self._outcome(
            scenario,
            name,
            problems=problems + gate.performance_problems(log, audit=bool(audit)),
            deviations=gate.deviations(log, self.benchmark, job.seeds),
            figures=_figures(log, report),
        )

    def _expectations(self, scenario: str) -> dict[str, float]:
        """The user.conf of a performance run: what LoadGen wants to know beforehand, from a probe."""
        probe, conf = self._probe(), self._durations()
        if scenario == "SingleStream":
            conf["target_latency"] = _stream_latency(probe["latency_1"][0])
        elif scenario == "MultiStream":
            conf["target_latency"] = _stream_latency(probe["latency_8"][0])
        elif scenario == "Offline":
            conf["target_qps"] = self._fastest() * 1.05
            if self.settings.quick is not None:
                conf["min_query_count"] = 1
        elif self.settings.latency_ms is not None:
            conf["target_latency"] = self.settings.latency_ms
        return conf

    def _durations(self) -> dict[str, float]:
        return {} if self.settings.quick is None else {"min_duration": self.settings.quick * 1e3}

    def _search_rate(self, conf: Mapping[str, float]) -> dict[str, Any]:
        """The highest Server rate that short runs sustain."""
        quick = self.settings.quick
        seconds = 60.0 if quick is None else min(15.0, quick)

        tails: list[float | None] = []

        def sustained(rate: float) -> bool:
            folder = self.folder / "Server" / "search"
            with results.writing(folder) as out:
                step = self._attempt(
                    "Server", "search", out, {**conf, "target_qps": rate, "min_duration": seconds * 1e3}
                )
            self._tell(f"Server search: {rate:.4g}/s {'sustained' if step.valid else 'not sustained'}")
            tail = (step.figures.get("percentiles_ns") or {}).get("99.00")
            tails.append(None if tail is None else tail / 1e6)
            return step.valid

        peak = self._fastest()
        found = find_rate(sustained, 0.7 * peak, precision=0.03 if quick is None else 0.06)
        return {**asdict(found), "certainty": found.certainty, "seconds": seconds, "tails_ms": tails}

    def _accuracy(self, scenario: str, out: Path) -> Step:
        # Without a rate, the Server scenario would ask one question a second.
        conf = {"target_qps": 0.5 * self._fastest()} if scenario == "Server" else {}
        job = self._job(scenario, "accuracy", out, conf)
        self._tell(f"{scenario} accuracy: running over {len(self.library.samples)} samples")
        report, problems = self._work_on(job, out)
        if problems:
            return self._outcome(scenario, "accuracy", problems=problems, figures=_costs(report))
        log = DetailLog(out / DETAIL)
        answers = complete_answers(out / ACCURACY, len(self.library.samples))
        found = self.library.score(answers)
        (out / "accuracy.txt").write_text(f"{found.line}\nhash={sha256(out / ACCURACY)}\n", encoding="utf-8")
        aim = {"reference": self.benchmark.reference, "target": self.benchmark.target}
        figures = {"metric": found.value, "name": found.metric, **found.details, **aim}
        return self._outcome(scenario, "accuracy", problems=gate.log_errors(log), figures={**figures, **_costs(report)})

    def _audit(self, scenario: str, audit: str, out: Path) -> Step:
        """A compliance test: another performance run, compared with the two runs before it."""
        base = self.folder / scenario
        performance, accuracy = (results.read_step(base / name) for name in ("performance", "accuracy"))
        if performance is None or accuracy is None or not performance.valid or not accuracy.valid:
            raise RulesError(
                f"{audit} compares with the performance and accuracy runs of {scenario}; they must count first"
            )
        test = compliance.find_audit(audit)
        seeds = self.round.audit_seeds if test.alternative_seeds else self.round.seeds
        conf = self._durations() | dict(performance.figures["user_conf"])
        step = self._attempts(scenario, audit, out, conf, audit=test.config, seeds=dict(seeds))
        if step.valid:
            step = replace(step, problems=compliance.verify(test, base, out, self.library, self.benchmark))
        return step

    def _find_peak(self, scenario: str, out: Path) -> Step:
        if scenario != "Server":
            raise RulesError(
                f"LoadGen searches for the peak of the Server scenario only; {scenario} has none to search for"
            )
        conf = {**self._expectations(scenario), "target_qps": 0.5 * self._fastest()}
        report, problems = self._work_on(self._job(scenario, "find-peak", out, conf), out)
        log = DetailLog(out / DETAIL)
        if log.peak is None and not problems:
            problems = ["LoadGen found no peak; its log says why"]
        return self._outcome(
            scenario,
            "find-peak",
            problems=problems + gate.log_errors(log),
            deviations=gate.deviations(log, self.benchmark, self.round.seeds),
            figures={"peak": log.peak, **_costs(report)},
        )


# --- parts ------------------------------------------------------------------------------------------------------------


def run_worker(out: Path, python: Path | None) -> int:
    """Run ``job.json`` in ``out`` in a process of its own; its exit code. An interruption ends that process too."""
    environment = dict(os.environ)
    if python is not None:
        source = str(Path(espalier.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    command = [str(python or sys.executable), "-m", "espalier.mlperf.worker", str(out / "job.json")]
    with (out / _LOG).open("wb") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        except OSError as error:
            raise InputError(
                f"{command[0]} cannot be started: {error.strerror}; give an interpreter to --python"
            ) from error
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise


def last_words(log: Path) -> str:
    """The end of what a process printed."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return " ".join(text.split())[-300:] or "it said nothing"


def _exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def digest(model: Path) -> str:
    """One checksum over a model file, or over the names and contents of the files in a folder."""
    if not model.is_dir():
        return sha256(model)
    total = hashlib.sha256()
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(model)}\0{sha256(path)}\n".encode())
    return total.hexdigest()


def describe_weights(model: Path) -> dict[str, Any]:
    """The share of zeros of a model's linear layers, and where they run; the reason where that cannot be told."""
    try:
        report = espalier.load(model, threads=1, tune=False).report()
    except EspalierError as error:
        return {"unknown": str(error)}
    layers = [layer for layer in report.layers if layer.sparsity is not None]
    zeros = [layer.sparsity for layer in layers if layer.sparsity is not None]
    return {
        "linear_layers": len(layers),
        "zeros": round(sum(zeros) / len(zeros), 4) if zeros else None,
        "formats": sorted({layer.format for layer in layers if layer.format}),
        "types": sorted({layer.type for layer in layers if layer.type}),
    }


def _engine_model(model: Path, work: Path, *, onnx: bool) -> Path:
    if not onnx:
        return model
    from espalier.bench.run import as_onnx

    return as_onnx(model, work).resolve()


def _system_name(model: Path, settings: Settings, padding: str) -> str:
    parts = [settings.engine, model.stem if model.is_file() else model.name]
    if padding == "longest":
        parts.append("unpadded")
    load = settings.load
    if load.is_gpu:
        parts += [load.device, "fp8" if load.calibration is not None else load.precision or "bf16"]
    return "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in part) for part in parts)


def _expected(conf: Mapping[str, float]) -> float:
    return float(conf.get("target_qps", conf.get("target_latency", 0.0)))


def _stream_latency(seconds: float) -> float:
    """The milliseconds to expect of a query that took so long once: less, so that LoadGen generates enough of them."""
    return max(0.7 * seconds, 1 / FASTEST) * 1e3


def _adjust(scenario: str, conf: dict[str, float], step: Step) -> bool:
    """Correct an expectation that made a run invalid; False when that was not the reason."""
    metric, figures = step.figures.get("metric"), step.figures
    if not metric or not all(problem.startswith(_TOO_LITTLE) for problem in step.problems):
        return False
    if scenario == "Server" and any("Would need to run at least" in problem for problem in step.problems):
        conf["min_query_count"] *= 2
    elif scenario == "Server":
        conf["target_qps"] *= 0.97
    elif scenario == "Offline" and not figures["min_duration_met"]:
        conf["target_qps"] = max(metric, conf["target_qps"]) * 1.1
    elif scenario != "Offline" and not (figures["min_duration_met"] and figures["min_queries_met"]):
        conf["target_latency"] = min(0.6 * conf["target_latency"], _stream_latency(figures["mean_ns"] / 1e9))
    else:
        return False
    return True


def _figures(log: DetailLog, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a performance run gave: ``metric`` as the scenario's rules define it, and what explains it."""
    return {
        "metric": log.metric,
        "percentiles_ns": {p: log.latency(p) for p in ("50.00", "90.00", "95.00", "99.00", "99.90")},
        "mean_ns": log["result_mean_latency_ns"],
        "queries": log["result_query_count"],
        "early_stopping": log.early_stopping,
        "min_duration_met": bool(log["result_min_duration_met"]),
        "min_queries_met": bool(log["result_min_queries_met"]),
        "target_qps": log["effective_target_qps"],
        "target_latency_ns": log["effective_target_latency_ns"],
        "duration_ms": log["effective_min_duration_ms"],
        "loadgen": log["loadgen_version"],
        **_costs(report),
    }


def _short(step: Step) -> str:
    """A step's outcome in a few words."""
    if not step.valid:
        return f"does not count: {step.problems[0]}"
    figures = step.figures
    if step.name == "accuracy":
        text = f"{figures['name']} {figures['metric']:.3f}"
    elif "peak" in figures:
        text = str(figures["peak"])
    elif step.scenario in ("SingleStream", "MultiStream"):
        text = f"{figures['metric'] / 1e6:.3f} ms"
    else:
        text = f"{figures['metric']:.5g}/s"
    return text + (", not conforming" if step.deviations else "")


def _costs(report: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("seconds", "joules", "load_s", "versions", "machines", "loadgen_machine")
    return {key: report[key] for key in keys if report.get(key) is not None}
