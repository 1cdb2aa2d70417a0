"""The verb ``submit``: the directory that MLPerf's submission checker expects, from results that count.

Two layouts: v6.1 has everything of a scenario in one folder, v4.1 spreads it over results, measurements and compliance.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import espalier
from espalier._network import is_loopback
from espalier.doctor import cpu
from espalier.errors import InputError, RulesError
from espalier.mlperf.benchmarks import find
from espalier.mlperf.loadgen import ACCURACY, DETAIL, SUMMARY, DetailLog
from espalier.mlperf.network.qdl import CONNECTIONS
from espalier.mlperf.report.rows import UNVERIFIED
from espalier.mlperf.results import System, read_results
from espalier.mlperf.rounds import Round, find_round
from espalier.mlperf.system import Machine, Network, describe_machine, describe_system, host_of

PRUNED = "Discarding non-zero weight elements, including pruning"
"""Disallowed in the closed division: MLPerf Inference Rules, "Model equivalence"."""
RETRAINED = "The closed division allows calibration for quantization and does not allow any retraining."
"""MLPerf Inference Rules, "Closed Division"."""
MOST_ZEROS = 0.01
"""Share of zeros in linear layers that an unpruned model may have."""
_VIEWABLE = 4096
"""Bytes that are left of an accuracy log at each end; the checker wants less than 10 KiB in all."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What to write. ``unmodified`` declares that a closed model has the reference's weights, quantised at most.

    ``draft`` writes runs that do not conform too, for a rehearsal; the checker will find them out.
    """

    submitter: str
    out: Path
    round: str = "v6.1"
    division: str | None = None
    category: str | None = None
    system: Path | None = None
    unmodified: bool = False
    draft: bool = False

    def __post_init__(self) -> None:
        find_round(self.round)
        if not self.submitter or any(c.isspace() or c in "/\\" for c in self.submitter) or self.submitter[0] == ".":
            raise InputError(f"a submitter's name is a folder's, without spaces and slashes; got {self.submitter!r}")


def submit(folder: Path, submission: Submission) -> Path:
    """Write the submission of every system in a folder of results; returns its root.

    Raises RulesError for what must not be submitted, with the reason; DataError or InputError for bad input.
    """
    systems = read_results(folder)
    for system in systems:
        check(system, submission)
    if submission.out.exists() and any(submission.out.iterdir()):
        raise InputError(f"{submission.out} is not empty; give a new folder for the submission")
    submission.out.mkdir(parents=True, exist_ok=True)
    for system in systems:
        _Writer(system, submission).write()
    return submission.out


def division_of(system: System, submission: Submission) -> str:
    """The division asked for, else the one the runs were made for."""
    return submission.division or str(system.about["division"])


def category_of(system: System, submission: Submission) -> str:
    """Likewise the category."""
    return submission.category or str(system.about["category"])


def submitted(system: System) -> list[str]:
    """The scenarios that have a performance run."""
    return [scenario for scenario in system.scenarios if system.step(scenario, "performance")]


def check(system: System, submission: Submission) -> None:
    """Raise RulesError when the rules, or our own gate, do not let a system be submitted."""
    division, category, rules = (
        division_of(system, submission),
        category_of(system, submission),
        find_round(submission.round),
    )
    benchmark = str(system.about["identity"]["benchmark"])
    if not find(benchmark).official:
        raise RulesError(f"{system.name}: {benchmark} is not an MLPerf benchmark, so it cannot be submitted; report it")
    if system.about["identity"]["round"] != rules.name:
        raise RulesError(
            f"{system.name} was measured with the seeds of {system.about['identity']['round']}, not of {rules.name}; "
            f"measure with espalier mlperf run --round {rules.name}"
        )
    if division not in ("open", "closed"):
        raise RulesError(f"{system.name}: expected the division open or closed, got {division!r}")
    required = rules.required.get(category)
    if required is None:
        raise RulesError(f"{system.name}: expected the category edge or datacenter, got {category!r}")
    # The older checker refuses unknown pairs of benchmark and category in the open division too.
    if benchmark not in required and (division == "closed" or not rules.one_folder):
        raise RulesError(
            f"{system.name}: round {rules.name} has no {benchmark} in the {division} division for {category}"
        )
    scenarios = submitted(system)
    if not scenarios:
        raise RulesError(f"{system.name}: no performance run; measure one with espalier mlperf run")
    for scenario in scenarios:
        _check_runs(system, scenario, draft=submission.draft)
    if "network" in system.about["identity"]:
        _check_network(system, division, draft=submission.draft)
    if division == "closed":
        _check_closed(system, submission, required[benchmark], rules)


def _check_runs(system: System, scenario: str, *, draft: bool) -> None:
    for name in ("performance", "accuracy"):
        step = system.step(scenario, name)
        where = f"{system.name}: {scenario} {name}"
        if step is None:
            raise RulesError(f"{where} was not run; both runs are needed: espalier mlperf run --mode {name}")
        if not step.valid:
            raise RulesError(f"{where} does not count: {step.problems[0]}; the same espalier mlperf run repeats it")
        if step.model_digest != system.about["identity"]["model"]:
            raise RulesError(f"{where} was made with another model file; measure again with --fresh")
        if step.deviations and not draft:
            raise RulesError(
                f"{where} does not conform: {step.deviations[0]}; run without --quick (or write a --draft)"
            )


def _check_network(system: System, division: str, *, draft: bool) -> None:
    if division == "closed":
        raise RulesError(
            f"{system.name} ran on nodes over a network, which the closed division does not allow; submit it as open"
        )
    own = [a for a in system.about["identity"]["network"] if is_loopback(host_of(a))]
    if own and not draft:
        raise RulesError(
            f"{system.name}: the node at {own[0]} is LoadGen's own machine, and the rules want separate ones; run "
            "nodes elsewhere (or write a --draft)"
        )


def _check_closed(system: System, submission: Submission, required: Sequence[str], rules: Round) -> None:
    where = f"{system.name} cannot be closed"
    weights = system.about.get("weights", {})
    zeros = weights.get("zeros")
    if zeros is None:
        raise RulesError(f"{where}: whether its model is pruned is not known ({weights.get('unknown', 'no weights')})")
    if zeros > MOST_ZEROS:
        raise RulesError(
            f'{where}: {zeros:.0%} of its weights are zero, and the rules disallow "{PRUNED}"; submit it as open'
        )
    if not submission.unmodified:
        raise RulesError(
            f'{where} unless its weights are the reference model\'s: "{RETRAINED}" Say so with --unmodified, or submit '
            "it as open"
        )
    missing = [scenario for scenario in required if scenario not in submitted(system)]
    extra = [scenario for scenario in submitted(system) if scenario not in required]
    if missing or extra:
        raise RulesError(
            f"{where}: round {rules.name} wants {', '.join(required)}; it has {', '.join(submitted(system))}"
        )
    target = find(str(system.about["identity"]["benchmark"])).target
    for scenario in required:
        accuracy = system.step(scenario, "accuracy")
        if accuracy is not None and target is not None and accuracy.figures["metric"] < target:
            raise RulesError(
                f"{where}: its {accuracy.figures['name']} is {accuracy.figures['metric']:.3f}, below {target:.3f}"
            )
        for audit in rules.audits:
            step = system.step(scenario, audit)
            if step is None or not step.valid:
                reason = "was not run" if step is None else f"does not count: {step.problems[0]}"
                raise RulesError(f"{where}: {scenario} {audit} {reason}; espalier mlperf run --audit {audit}")


class _Writer:
    """The tree of one system."""

    def __init__(self, system: System, submission: Submission) -> None:
        self.system = system
        self.submission = submission
        self.rules = find_round(submission.round)
        self.division = division_of(system, submission)
        self.benchmark = str(system.about["identity"]["benchmark"])
        self.root = submission.out / self.division / submission.submitter

    def write(self) -> None:
        self._write_system()
        self._write_documentation()
        self._write_sources()
        for scenario in submitted(self.system):
            self._write_scenario(scenario)

    def _place(self, kind: str, scenario: str) -> Path:
        """The folder for the ``results``, ``measurements`` or ``compliance`` of a scenario."""
        kind = "results" if self.rules.one_folder else kind
        return self.root / kind / self.system.name / self.benchmark / scenario

    def _write_system(self) -> None:
        about = describe_system(
            submitter=self.submission.submitter,
            division=self.division,
            category=category_of(self.system, self.submission),
            framework=_framework(self.system),
            overrides=self.submission.system,
            machines=_machines(self.system),
            network=_network(self.system),
        )
        _write(self.root / "systems" / f"{self.system.name}.json", json.dumps(about, indent=2) + "\n")

    def _write_documentation(self) -> None:
        about = self.system.about
        text = (
            "# Calibration and quantisation\n\n"
            f"{self.system.name}: {about['model']}. Linear layers run as "
            f"{', '.join(about['weights'].get('formats', [])) or 'the engine chose'}. " + _calibration(self.system)
        )
        _write(self.root / "documentation" / "calibration.md", text)

    def _write_sources(self) -> None:
        """The harness and the engine's Python side; the C++ side is in the repository of the same version."""
        folder = self.root / ("src" if self.rules.one_folder else "code")
        place = folder / self.benchmark / "espalier"
        if not place.exists():
            package = Path(espalier.__file__).parent
            skip = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", ".*")
            shutil.copytree(package, place, ignore=skip)
            for empty in (path for path in place.rglob("*") if path.is_dir() and not any(path.iterdir())):
                empty.rmdir()
        _write(folder / self.benchmark / "README.md", _readme(self.system, None))

    def _write_scenario(self, scenario: str) -> None:
        source = self.system.folder / scenario
        results, measurements = self._place("results", scenario), self._place("measurements", scenario)
        _copy(source / "performance", results / "performance" / "run_1", (SUMMARY, DETAIL))
        _copy(source / "accuracy", results / "accuracy", (SUMMARY, DETAIL, "accuracy.txt"))
        _truncate(source / "accuracy" / ACCURACY, results / "accuracy" / ACCURACY)
        _copy(source / "performance", measurements, ("user.conf",))
        _write(measurements / "README.md", _readme(self.system, scenario))
        name = "measurements.json" if self.rules.one_folder else f"{self.system.name}_espalier_{scenario}.json"
        _write(
            measurements / name,
            json.dumps(_measurements(self.system, unmodified=self.submission.unmodified), indent=2) + "\n",
        )
        if not self.rules.one_folder:
            _write(measurements / "mlperf.conf", _mlperf_conf(DetailLog(source / "performance" / DETAIL), self.rules))
        for audit in ("TEST01", "TEST05"):
            step = self.system.step(scenario, audit)
            if step is not None and step.valid and audit in self.rules.audits:
                self._write_audit(source / audit, self._place("compliance", scenario) / audit)

    def _write_audit(self, source: Path, place: Path) -> None:
        _copy(source, place / "performance" / "run_1", (SUMMARY, DETAIL))
        _copy(source, place, ("verify_performance.txt",))
        if (source / "verify_accuracy.txt").is_file():
            _copy(source, place, ("verify_accuracy.txt",))
            _truncate(source / ACCURACY, place / "accuracy" / ACCURACY)
            fallback = [n for n in ("baseline_accuracy.txt", "compliance_accuracy.txt") if (source / n).is_file()]
            _copy(source, place / "accuracy", ("accuracy.txt", *fallback))


def _machines(system: System) -> list[Machine]:
    """Those that ran the model, as they said during the run."""
    said = _performance(system).get("machines")
    if said is not None:
        return [Machine(**machine) for machine in said]
    if system.about["machine"]["cpu"] != cpu().model:
        raise RulesError(
            f"{system.name} was measured by an older release on another machine, which its results do not "
            "describe; write the submission there"
        )
    return [describe_machine()]


def _network(system: System) -> Network | None:
    addresses = system.about["identity"].get("network")
    if not addresses:
        return None
    said = _performance(system).get("loadgen_machine")
    loadgen = describe_machine() if said is None else Machine(**said)
    return Network(loadgen=loadgen, addresses=addresses, connections=CONNECTIONS * len(addresses))


def _performance(system: System) -> dict[str, Any]:
    """The figures of the first performance run."""
    return next(step.figures for step in system.steps.values() if step.name == "performance")


def _framework(system: System) -> str:
    step = next((s for s in system.steps.values() if s.name == "performance" and s.figures.get("versions")), None)
    engine = str(system.about["identity"]["engine"])
    version = step.figures["versions"].get(engine, "") if step is not None else ""
    return f"{engine} {version}".strip()


def _measurements(system: System, *, unmodified: bool) -> dict[str, str]:
    weights: Mapping[str, Any] = system.about["weights"]
    zeros = weights.get("zeros")
    return {
        "input_data_types": "int64",
        "weight_data_types": _weight_types(system),
        "starting_weights_filename": str(system.about["model"]),
        "retraining": "no" if unmodified else "yes, or at least not excluded",
        "weight_transformations": f"{zeros:.1%} of the weights of linear layers are zero and stored sparsely"
        if zeros
        else "packed for the engine, values unchanged",
    }


def _calibration(system: System) -> str:
    digest = system.about["identity"].get("calibration")
    if digest is None:
        return (
            "Nothing is calibrated at run time, and no sample of the performance or accuracy set chose any numerics.\n"
        )
    return (
        "Activations of the layers in FP8 (e4m3) have one scale each, from `espalier calibrate`: the largest magnitude "
        f"on the calibration data over 448. The file of scales has SHA-256 {digest}. The data it was learnt from must "
        "be those that the rules allow for calibration; the harness cannot see that.\n"
    )


def _weight_types(system: System) -> str:
    """What linear layers multiply with: int8 where the model has it, else what they were told to."""
    found = {"int8" if "int8" in name else "fp32" for name in system.about["weights"].get("types", [])} or {"fp32"}
    settings = system.about["identity"]["settings"]
    if settings.get("device", "cpu") != "cpu":
        told = settings["precision"] or ("fp8" if settings["calibration"] else "bf16")
        found = {told if name == "fp32" else name for name in found} | ({"bf16"} if told == "fp8" else set())
    return ", ".join(sorted(found))


def _readme(system: System, scenario: str | None) -> str:
    about = system.about
    identity = about["identity"]
    options = f"--benchmark {identity['benchmark']} --scenario {scenario or 'all'} --division {about['division']}"
    return "\n".join(
        [
            f"# {system.name}: {about['title']}" + (f", {scenario}" if scenario else ""),
            "",
            f"Model: {about['model']} (SHA-256 {identity['model']}). {about['note']}".rstrip(),
            f"Data: {about['data']} (SHA-256 {identity['data']}), {about['samples']} samples.",
            f"Engine: {_framework(system)}; harness: espalier {about['espalier']}.",
            "",
            "To reproduce:",
            "",
            f"    pip install 'espalier[bench]=={about['espalier']}'",
            f"    espalier mlperf run {about['model']} --data DATA --engine {identity['engine']} {options} -o results/",
            "",
            UNVERIFIED,
            "",
        ]
    )


def _mlperf_conf(log: DetailLog, rules: Round) -> str:
    """What LoadGen used of its own configuration, which newer versions have compiled in."""
    keys = (*rules.seeds, "min_duration_ms", "min_query_count", "performance_sample_count", "samples_per_query",
            "target_latency_ns", "target_latency_percentile")  # fmt: skip
    lines = [f"# LoadGen {log['loadgen_version']} has mlperf.conf compiled in. In effect were:"]
    return "\n".join([*lines, *(f"# {key} = {log[f'effective_{key}']}" for key in keys), ""])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _copy(source: Path, place: Path, names: Sequence[str]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, place / name)


def _truncate(source: Path, place: Path) -> None:
    """Copy the two ends of a log; its hash is in accuracy.txt."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size <= 2 * _VIEWABLE:
        shutil.copyfile(source, place)
        return
    with source.open("rb") as file:
        start = file.read(_VIEWABLE)
        file.seek(-_VIEWABLE, 2)
        place.write_bytes(start + b"\n\n...\n\n" + file.read())


# --- the official checker ---------------------------------------------------------------------------------------------


def run_checker(checker: Path, submission: Submission) -> tuple[bool, str]:
    """Run MLPerf's checker over a written submission: whether it is content, and what it printed.

    ``checker``: a checkout of mlcommons/inference, its tools/submission, or the script. Raises InputError when there is
    none, or not the one for the round.
    """
    command = _checker_command(checker, find_round(submission.round))
    with tempfile.TemporaryDirectory(prefix="espalier-mlperf-") as scratch:
        arguments = ["--input", str(submission.out.resolve()), "--version", submission.round]
        arguments += ["--submitter", submission.submitter, "--csv", str(Path(scratch) / "summary.csv")]
        done = subprocess.run([*command[0], *arguments], cwd=command[1], capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    return done.returncode == 0 and "SUMMARY: submission looks OK" in printed, printed


def _checker_command(checker: Path, rules: Round) -> tuple[list[str], Path]:
    for folder in (checker, checker / "tools" / "submission", checker.parent):
        if rules.one_folder and (folder / "submission_checker" / "main.py").is_file():
            return [sys.executable, "-m", "submission_checker.main"], folder
        if not rules.one_folder and (folder / "submission_checker.py").is_file():
            return [sys.executable, "submission_checker.py"], folder
    wanted = "submission_checker/main.py" if rules.one_folder else "submission_checker.py (tag v4.1)"
    raise InputError(f"{checker}: expected mlcommons/inference with tools/submission/{wanted} for round {rules.name}")
