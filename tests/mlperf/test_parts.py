"""The parts of a run: logs, the gate, the search for a rate, samples and scores, watches, compliance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.data import Feature, Tokens, read_squad
from espalier.data.squad import evaluate
from espalier.errors import DataError, InputError, RulesError
from espalier.loading import LoadSettings
from espalier.mlperf import benchmarks, gate, loadgen
from espalier.mlperf.engines import EngineSettings, Espalier
from espalier.mlperf.features import Samples
from espalier.mlperf.library import PairsLibrary, SquadLibrary, read_library
from espalier.mlperf.rounds import ROUNDS
from espalier.mlperf.run import Settings
from espalier.mlperf.search import find_rate
from espalier.mlperf.watch import ClockWatch, Energy

SEEDS = ROUNDS["v6.1"].seeds


def write_log(path: Path, *, error: str = "", **values: Any) -> loadgen.DetailLog:
    """A detail log with these entries."""
    entries = [{"key": key, "value": value, "metadata": {"is_error": False}} for key, value in values.items()]
    if error:
        entries.append({"key": "error", "value": error, "metadata": {"is_error": True}})
    path.write_text("".join(f":::MLLOG {json.dumps(entry)}\n" for entry in entries))
    return loadgen.DetailLog(path)


def full(**changes: Any) -> dict[str, Any]:
    """What a full Offline run of BERT logs."""
    seeds = {f"effective_{name}": seed for name, seed in SEEDS.items()}
    return {
        "effective_scenario": "Offline",
        "effective_min_duration_ms": 600000,
        "effective_performance_sample_count": 10833,
        "effective_samples_per_query": 20000,
        "result_validity": "VALID",
        "result_samples_per_second": 30.5,
        **seeds,
        **changes,
    }


def test_a_full_run_passes(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", **full())
    assert gate.performance_problems(log) == []
    assert gate.deviations(log, benchmarks.find("bert-99"), SEEDS) == []
    assert log.metric == 30.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"result_validity": "INVALID", "result_invalid_reason": "too  short "}, "Result is : INVALID (too short)"),
        ({"result_validity": None}, "Result is : missing"),
        ({"error": "Multiple conf files are used."}, "Multiple conf files"),
    ],
)
def test_what_does_not_count(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (problem,) = gate.performance_problems(write_log(tmp_path / "log", **full(**changes)))
    assert message in problem


def test_an_audit_may_have_its_own_configuration(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", error="Multiple conf files are used.", **full())
    assert gate.performance_problems(log, audit=True) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effective_min_duration_ms": 60000}, "it had to last 60 s, the rules demand 600 s"),
        ({"effective_performance_sample_count": 64}, "it used 64 samples, the rules demand 10833"),
        ({"effective_samples_per_query": 100}, "its query had 100 samples"),
        ({"effective_qsl_rng_seed": 0}, "qsl_rng_seed was 0, expected 2085463073848966840"),
        (
            {"effective_scenario": "Server", "effective_target_latency_ns": 200e6},
            "its latency bound was 200 ms, the benchmark's is 130 ms",
        ),
    ],
)
def test_what_does_not_conform(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (found,) = gate.deviations(write_log(tmp_path / "log", **full(**changes)), benchmarks.find("bert-99"), SEEDS)
    assert message in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no entry of LoadGen's"),
        (':::MLLOG {"key": "a", "val', ":1: not a line of LoadGen's log"),
        (None, "cannot be read"),
    ],
)
def test_logs_that_are_damaged(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "log").write_text(content)
    with pytest.raises(DataError, match=message):
        loadgen.DetailLog(tmp_path / "log")


def answers_file(path: Path, answers: list[tuple[int, np.ndarray]]) -> Path:
    """An accuracy log."""
    entries = [{"seq_id": i, "qsl_idx": n, "data": a.tobytes().hex()} for i, (n, a) in enumerate(answers)]
    path.write_text(json.dumps(entries))
    return path


def test_answers_are_complete_and_finite(tmp_path: Path) -> None:
    one = np.ones(2, np.float32)
    found = loadgen.complete_answers(answers_file(tmp_path / "a", [(1, one), (0, 2 * one), (1, 3 * one)]), 2)
    assert found[1].tolist() == [1, 1]
    with pytest.raises(RulesError, match="answered 2 of 3 samples"):
        loadgen.complete_answers(tmp_path / "a", 3)
    for bad in (np.array([np.nan], np.float32), np.zeros(0, np.float32), np.zeros(3, np.int8)):
        with pytest.raises(RulesError, match="1 of 2 answers of the accuracy run are empty or not finite"):
            loadgen.complete_answers(answers_file(tmp_path / "b", [(0, one), (1, bad)]), 2)
    (tmp_path / "c").write_text("[{")
    with pytest.raises(DataError, match="not a complete accuracy log"):
        loadgen.complete_answers(tmp_path / "c", 2)


@pytest.mark.parametrize("threshold", [3.0, 70.0, 99.9, 240.0])
def test_the_highest_rate_is_found(threshold: float) -> None:
    found = find_rate(lambda rate: rate <= threshold, 100.0, precision=0.03)
    assert found.valid <= threshold
    assert found.invalid is not None
    assert found.valid < found.invalid <= found.valid * 1.03
    assert "% apart" in found.certainty


def test_a_search_without_an_end() -> None:
    assert "no rate tried was too high" in find_rate(lambda _: True, 1.0, precision=0.03, ceiling=2.0).certainty
    with pytest.raises(RulesError, match="no rate down to"):
        find_rate(lambda _: False, 1.0, precision=0.03)


def test_scenarios_by_any_spelling() -> None:
    assert benchmarks.scenarios("server, OFFLINE,server") == ["Server", "Offline"]
    assert benchmarks.scenarios("all") == list(benchmarks.SCENARIOS)
    with pytest.raises(InputError, match="unknown scenario 'interactive'; known: SingleStream"):
        benchmarks.scenarios("interactive")


def test_samples_come_back_from_a_file(tmp_path: Path) -> None:
    features = [Feature(np.arange(n, dtype=np.int32), np.ones(n, np.int8), {}) for n in (3, 1, 5)]
    Samples.of(features).save(tmp_path / "s.npz")
    samples = Samples.load(tmp_path / "s.npz")
    assert len(samples) == 3
    assert samples.lengths.tolist() == [3, 1, 5]
    assert [samples[i].ids.tolist() for i in range(3)] == [[0, 1, 2], [0], [0, 1, 2, 3, 4]]
    with pytest.raises(DataError, match="no sample"):
        Samples.of([])


def test_right_answers_score_all(tokenizer_folder: Path, squad_file: Path) -> None:
    library = read_library("squad", squad_file, tokenizer_folder)
    assert isinstance(library, SquadLibrary)
    answers = {}
    for number, piece in enumerate(library.pieces):
        scores = np.zeros((len(piece.feature.ids), 2), np.float32)
        scores[piece.feature.target["start"], 0] = scores[piece.feature.target["end"], 1] = 1
        answers[number] = scores.ravel()
    assert library.score(answers).line == '{"exact_match": 100.0, "f1": 100.0}'
    del answers[0]
    assert library.score(answers).value == pytest.approx(100 * 11 / 12)


def test_sentence_pairs_are_scored_by_rank(tokenizer_folder: Path, pairs_file: Path) -> None:
    library = PairsLibrary.read(pairs_file, Tokens.read(tokenizer_folder, 128))
    assert len(library.samples) == 40
    angles = np.linspace(1.5, 0, 20)  # the higher the score, the closer
    answers = {i: np.array([1, 0], np.float32) for i in range(20)}
    answers |= {20 + i: np.array([np.cos(a), np.sin(a)], np.float32) for i, a in enumerate(angles)}
    assert library.score(answers).value == pytest.approx(100)


def test_scores_are_the_official_evaluators_to_the_last_digit(squad_file: Path, tmp_path: Path) -> None:
    """Beside the evaluator itself where it is at hand, and beside its formulas written out anywhere."""
    questions = read_squad(squad_file)
    rng = np.random.default_rng(0)
    words = [*(f"w{i}" for i in range(20)), "the", "a", "w1,", "W2"]
    said = {q.id: " ".join(rng.choice(words, rng.integers(1, 5))) for q in questions}
    said["q1"] = "The " + next(q for q in questions if q.id == "q1").answers[0].text.upper() + "!"
    exact, f1 = evaluate(questions, said)
    assert 0 < exact < f1 < 100
    place = os.environ.get("ESPALIER_SQUAD_EVALUATOR")
    if not place:
        pytest.skip("ESPALIER_SQUAD_EVALUATOR does not say where the official evaluate-v1.1.py lies")
    (tmp_path / "said.json").write_text(json.dumps(said))
    command = [sys.executable, place, str(squad_file), str(tmp_path / "said.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == {"exact_match": exact, "f1": f1}


def test_a_step_of_the_clock_is_seen() -> None:
    now = [100.0, 0.0]
    with ClockWatch(every=60, wall=lambda: now[0], steady=lambda: now[1]) as watch:
        now[0], now[1] = 110.0, 10.0
        watch.look()
        assert watch.steps == []
        now[0], now[1] = 121.5, 20.0
    assert watch.steps == pytest.approx([1.5])
    (problem,) = gate.worker_problems({"clock_steps": watch.steps})
    assert "clock was moved by +1.50 s" in problem


def test_energy_counters_that_wrap(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (zone / "energy_uj").write_text("9000000\n")
    energy = Energy(tmp_path)
    (zone / "energy_uj").write_text("2000000\n")
    assert energy.joules() == {"package-0": 3.0}
    assert Energy(tmp_path / "nowhere").joules() == {}


def test_the_data_file_in_a_folder(tokenizer_folder: Path, squad_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected SQuAD's dev-v1\.1\.json in it"):
        read_library("squad", tmp_path, tokenizer_folder)
    squad_file.rename(tmp_path / "dev-v1.1.json")
    assert read_library("squad", tmp_path, tokenizer_folder).title.startswith("dev-v1.1.json, not one of the files")


@pytest.mark.slow
def test_the_real_data_makes_the_benchmarks_samples(
    shared_data: Path, tmp_path: Path, save_tokenizer: Callable[[Path], None]
) -> None:
    from tokenizers import BertWordPieceTokenizer

    squad = shared_data / "squad"
    BertWordPieceTokenizer(str(squad / "vocab.txt"), lowercase=True).save(str(tmp_path / "tokenizer.json"))
    library = read_library("squad", squad, tmp_path)
    assert len(library.samples) == 10833
    assert library.title == "SQuAD v1.1 dev, rebuilt"


def test_settings_of_an_engine_travel_as_json() -> None:
    load = LoadSettings(threads=3, tune=False, device="torch-cpu", calibration=Path("scales.json"))
    settings = EngineSettings(load=load, padding="none", batch=16, max_length=384)
    said = json.loads(json.dumps(settings.to_dict()))
    assert (said["threads"], said["calibration"], said["padding"]) == (3, "scales.json", "none")
    assert EngineSettings.from_dict(said).to_dict() == said


def test_the_engine_warms_up_for_the_samples_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        warmed: Any = None

        def warm_up(self, lengths: list[int]) -> None:
            self.warmed = lengths

    class Fake:
        def __init__(self, session: Session, _tokens: None) -> None:
            self.session = session
            self.ran = 0

        def run(self, features: Any) -> list[Any]:
            self.ran += len(features)
            return []

    session = Session()
    monkeypatch.setattr(LoadSettings, "open", lambda _, model: session)
    settings = EngineSettings(load=LoadSettings(), padding="none", batch=1, max_length=384)
    engine: Any = Espalier(Path("model"), Fake, settings)  # type: ignore[arg-type]
    engine.warm_up([Feature(np.ones(n, np.int32), np.zeros(n, np.int8), {}) for n in range(1, 9)])
    assert session.warmed == list(range(1, 9))
    assert engine._pipeline.ran == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "onnxruntime", "load": LoadSettings(device="torch-cpu")}, "leave out device 'torch-cpu'"),
        ({"network": ("10.0.0.2:8010",), "load": LoadSettings(device="cuda")}, "give it to espalier mlperf node"),
        ({"network": ("10.0.0.2:8010",), "engine": "onnxruntime"}, "onnxruntime cannot be measured over the network"),
    ],
)
def test_settings_that_would_be_left_out_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(benchmark="bert-99", data=Path(), out=Path(), **options)
