"""Runs: what counts, what does not and why, and that finished steps stay."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.errors import DataError, InputError, ModelNotFoundError, RulesError
from espalier.mlperf import results
from espalier.mlperf import run as running
from espalier.mlperf.run import Settings, run

MakeSettings = Callable[..., Settings]
KEPT = ("SingleStream", "performance")


@pytest.fixture
def small(squad_file: Path, tmp_path: Path, settings: MakeSettings, loadgen: None) -> Settings:
    """A quick run over twelve questions."""
    return settings(squad_file, tmp_path / "results", benchmark="custom", scenarios=("SingleStream",), quick=0.1)


def test_what_a_run_leaves(quick_results: Path) -> None:
    (system,) = results.read_results(quick_results)
    assert system.name == "noop-nothing"
    assert system.scenarios == ["SingleStream", "Offline"]
    for scenario in system.scenarios:
        performance, accuracy = system.step(scenario, "performance"), system.step(scenario, "accuracy")
        assert performance is not None
        assert performance.valid
        assert performance.deviations[0] == "it had to last 0.3 s, the rules demand 600 s"
        assert performance.figures["metric"] > 0
        assert accuracy is not None
        assert accuracy.conforming
        assert accuracy.figures["metric"] == 0  # it answered nothing
        folder = system.folder / scenario
        assert (folder / "accuracy" / "accuracy.txt").read_text().startswith('{"exact_match": 0.0, "f1": 0.0}\nhash=')
        assert (folder / "performance" / "times.npy").is_file()
        assert (folder / "performance" / "mlperf_log_trace.json").stat().st_size == 0
    assert not list(quick_results.rglob(".*"))


def test_finished_steps_are_not_repeated(small: Settings, noop_model: Path) -> None:
    told: list[str] = []
    first = run(noop_model, small, tell=told.append)
    again = run(noop_model, small, tell=told.append)
    assert again.steps == first.steps
    assert sum("finished before" in text for text in told) == 2


def test_an_interruption_is_recorded_and_the_next_run_goes_on(
    small: Settings, noop_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.run_worker

    def interrupted(out: Path, python: Path | None) -> int:
        if "accuracy" in out.name:
            raise KeyboardInterrupt
        return real(out, python)

    monkeypatch.setattr(running, "run_worker", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(noop_model, small)
    folder = small.out / "noop-nothing"
    stopped = results.read_system(folder)
    assert stopped.steps[KEPT].valid
    assert stopped.steps["SingleStream", "accuracy"].problems == ["it was interrupted"]
    monkeypatch.setattr(running, "run_worker", real)
    done = run(noop_model, small)
    assert done.steps[KEPT] == stopped.steps[KEPT]
    assert done.steps["SingleStream", "accuracy"].valid


def test_an_engine_that_ends_its_process(small: Settings, noop_model: Path, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho out of luck >&2\nkill -SEGV $$\n")
    fake.chmod(0o755)
    run(noop_model, small)  # the probe, and an earlier result to keep
    (small.out / "noop-nothing" / "SingleStream" / "accuracy" / "step.json").unlink()
    system = run(noop_model, Settings(**{**vars(small), "python": fake}))
    step = system.steps["SingleStream", "accuracy"]
    assert step.problems == [f"the process of the run ended with signal {signal.SIGSEGV.name}: out of luck"]
    assert system.steps[KEPT].valid


def test_an_engine_that_fails_on_one_sample(
    small: Settings, squad_file: Path, make_qa_model: Callable[..., Path], tmp_path: Path
) -> None:
    content = json.loads(squad_file.read_text())
    content["data"][0]["paragraphs"][-1]["qas"][-1]["question"] = "w59"
    data = tmp_path / "one-bad.json"
    data.write_text(json.dumps(content).replace("w59 w", "w58 w").replace(" w59", " w58"))
    model = make_qa_model(known_words=59)  # w59 has no row in its embedding
    system = run(model, Settings(**{**vars(small), "data": data, "engine": "espalier", "modes": ("accuracy",)}))
    (problem,) = system.steps["SingleStream", "accuracy"].problems
    assert problem.startswith("the engine failed on 1 samples, first with: InputShapeError")


def test_a_model_that_changes_while_it_is_measured(
    small: Settings, noop_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(noop_model, tmp_path / "model"))
    small = Settings(**{**vars(small), "modes": ("accuracy",)})
    accuracy = ("SingleStream", "accuracy")
    real = running.run_worker

    def meddling(out: Path, python: Path | None) -> int:
        (model / "extra.bin").write_bytes(out.name.encode())
        return real(out, python)

    monkeypatch.setattr(running, "run_worker", meddling)
    system = run(model, small)
    assert "changed while it was measured" in system.steps[accuracy].problems[0]
    with pytest.raises(RulesError, match=r"holds results of another system: model changed"):
        run(model, small)
    (model / "extra.bin").unlink()
    monkeypatch.setattr(running, "run_worker", real)
    assert run(model, small).steps[accuracy].valid


def test_a_full_disc(small: Settings, noop_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(noop_model, small)
    kept = results.read_system(small.out / "noop-nothing").steps[KEPT]
    (small.out / "noop-nothing" / "SingleStream" / "accuracy" / "step.json").unlink()
    monkeypatch.setattr(results, "FREE_BYTES", 1 << 62)
    with pytest.raises(RulesError, match="MB are free, a run wants"):
        run(noop_model, small)
    assert results.read_system(small.out / "noop-nothing").steps[KEPT] == kept


def test_an_outcome_that_does_not_count_never_replaces_one_that_does(tmp_path: Path) -> None:
    good = results.Step("Offline", "accuracy", [], [], "digest")
    bad = results.Step("Offline", "accuracy", ["no"], [], "digest")
    folder = tmp_path / "accuracy"
    for step, place in ((bad, folder), (good, folder), (bad, tmp_path / "accuracy.invalid"), (good, folder)):
        with results.writing(folder) as temporary:
            assert results.keep(temporary, folder, step) == place
    assert results.read_step(folder) == good


def test_other_settings_are_another_system(small: Settings, noop_model: Path) -> None:
    small = Settings(**{**vars(small), "modes": ("accuracy",)})
    run(noop_model, small)
    changed = Settings(**{**vars(small), "quick": 0.2})
    with pytest.raises(RulesError, match=r"quick changed \(quick was 0\.1, is 0\.2\); give another --name, or --fresh"):
        run(noop_model, changed)
    assert run(noop_model, Settings(**{**vars(changed), "fresh": True})).about["identity"]["quick"] == 0.2


def test_damaged_data_is_refused(small: Settings, noop_model: Path, squad_file: Path) -> None:
    (squad_file.parent / "SHA256SUMS").write_text(f"{'0' * 64}  {squad_file.name}\n")
    with pytest.raises(DataError, match="is damaged"):
        run(noop_model, small)


def test_data_of_another_size_is_not_the_benchmarks(small: Settings, noop_model: Path) -> None:
    with pytest.raises(RulesError, match=r"makes 12 samples, bert-99 has 10833"):
        run(noop_model, Settings(**{**vars(small), "benchmark": "bert-99"}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"engine": "abacus"}, InputError, "unknown engine 'abacus'; known: espalier"),
        ({"benchmark": "bert"}, InputError, "unknown benchmark 'bert'; known: bert-99"),
        ({"data": Path("nowhere")}, DataError, "nowhere: no such file or folder"),
        ({"padding": "max"}, InputError, "the engine noop has no padding 'max'"),
    ],
)
def test_bad_settings(
    small: Settings, noop_model: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(noop_model, Settings(**{**vars(small), **change}))  # type: ignore[arg-type]


def test_a_model_that_is_not_there(small: Settings, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        run(tmp_path / "nowhere", small)


@pytest.mark.slow
def test_a_real_engine_through_every_scenario(
    small: Settings, make_qa_model: Callable[..., Path], squad_file: Path
) -> None:
    scenarios = ("SingleStream", "MultiStream", "Server", "Offline")
    changes = {"engine": "espalier", "scenarios": scenarios, "server_qps": 20.0, "latency_ms": 2000.0, "quick": 0.2}
    system = run(make_qa_model(), Settings(**{**vars(small), **changes}))  # type: ignore[arg-type]
    assert system.scenarios == list(scenarios)
    found = {scenario: system.steps[scenario, "accuracy"].figures["metric"] for scenario in scenarios}
    assert len(set(found.values())) == 1  # the answers do not depend on how they were asked for


def test_an_engine_faster_than_it_was_said_to_be_gets_more_queries() -> None:
    """What DeepSparse compiled for a batch of sixteen takes for one query says little about one compiled for one."""
    problems = [
        "LoadGen: Ending early: Ran out of generated queries to issue ...",
        "LoadGen: Result is : INVALID (...)",
    ]
    figures = {"metric": 123e6, "mean_ns": 108e6, "min_duration_met": False, "min_queries_met": True}
    step = results.Step("SingleStream", "performance", problems, [], "digest", figures)
    conf = {"target_latency": 1687.0}
    assert running._adjust("SingleStream", conf, step)
    assert conf["target_latency"] == pytest.approx(0.7 * 108)
    assert not running._adjust("SingleStream", conf, replace(step, problems=["the model file changed", *problems]))


def test_an_audit_corrects_what_it_expects_too(
    quick_results: Path, big_squad: Path, noop_model: Path, settings: MakeSettings
) -> None:
    """The machine may be faster by then than it was in the performance run."""
    folder = quick_results / "noop-nothing" / "Offline"
    shutil.rmtree(folder / "TEST01")
    path = folder / "performance" / results.STEP
    step = json.loads(path.read_text())
    step["figures"]["user_conf"]["target_qps"] /= 30
    path.write_text(json.dumps(step))
    run(noop_model, settings(big_squad, quick_results, scenarios=("Offline",), audits=("TEST01",)))
    audit = results.read_step(folder / "TEST01")
    assert audit is not None
    assert len(audit.figures["attempts"]) > 1
    assert not any(problem.startswith("LoadGen") for problem in audit.problems)
