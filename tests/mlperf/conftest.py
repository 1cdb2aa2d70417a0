"""Real runs of LoadGen with the engine that does nothing, over as many samples as BERT's benchmark has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from espalier.loading import LoadSettings
from espalier.mlperf.run import Settings, run

SAMPLES = 10833


@pytest.fixture(scope="session")
def loadgen() -> None:
    """Skip where LoadGen is not installed."""
    pytest.importorskip("mlperf_loadgen", reason="MLPerf's load generator: pip install 'espalier[bench]'")


@pytest.fixture(scope="session")
def big_squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SQuAD file of as many questions as BERT's benchmark has samples, each in one piece."""
    folder = tmp_path_factory.mktemp("squad")
    answer = [{"text": "w2", "answer_start": 3}]
    questions = [{"id": str(i), "question": f"w{i % 60}", "answers": answer} for i in range(SAMPLES)]
    paragraph = {"context": "w1 w2 w3", "qas": questions}
    (folder / "dev-v1.1.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [paragraph]}]}))
    return folder


@pytest.fixture(scope="session")
def noop_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], None]) -> Path:
    """A model folder for the engine that does nothing: only a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "nothing"
    folder.mkdir()
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def _quick_results(loadgen: None, big_squad: Path, noop_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    run(noop_model, quick_settings(big_squad, out, audits=("TEST01",)))
    return out


@pytest.fixture
def quick_results(_quick_results: Path, tmp_path: Path) -> Path:
    """Results of quick runs, Offline and SingleStream with both modes and TEST01. A copy: tests may change it."""
    return Path(shutil.copytree(_quick_results, tmp_path / "results"))


@pytest.fixture
def full_results(quick_results: Path) -> Path:
    """The same as if the runs had been told to last 600 seconds, which no test can wait for."""
    return as_full(quick_results)


def as_full(quick_results: Path) -> Path:
    """Edit quick results into those of full runs."""
    for log in quick_results.glob("*/*/*/mlperf_log_detail.txt"):
        text = log.read_text()
        log.write_text(
            text.replace('"effective_min_duration_ms", "value": 300,', '"effective_min_duration_ms", "value": 600000,')
        )
    for path in quick_results.glob("*/*/*/step.json"):
        step = json.loads(path.read_text())
        # An engine that does nothing is not as fast twice: its scores differ by more than TEST01 allows.
        problems = [problem for problem in step["problems"] if "the rules allow 10 %" not in problem]
        path.write_text(json.dumps({**step, "problems": problems, "deviations": []}))
    for path in quick_results.glob("*/*/TEST01/verify_performance.txt"):
        path.write_text("TEST PASS\n")
    return quick_results


def quick_settings(data: Path, out: Path, **changes: object) -> Settings:
    """Quick runs of the engine that does nothing."""
    values: dict[str, object] = {
        "benchmark": "bert-99",
        "engine": "noop",
        "quick": 0.3,
        "load": LoadSettings(threads=1),
    }
    return Settings(data=data, out=out, **{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def settings() -> Callable[..., Settings]:
    """``settings(data, out, **changes)``: see :func:`quick_settings`."""
    return quick_settings


@pytest.fixture(scope="session")
def make_qa_model(
    tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], None]
) -> Callable[..., Path]:
    """``make_qa_model(known_words=60)``: a tiny random BERT with the head of question answering."""
    torch = pytest.importorskip("torch", reason="makes the random model")
    transformers = pytest.importorskip("transformers", reason="makes the random model")

    def make(known_words: int = 60) -> Path:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=5 + known_words, max_position_embeddings=384, **sizes)
        folder = tmp_path_factory.mktemp("qa") / "tiny"
        transformers.BertForQuestionAnswering(config).save_pretrained(folder)
        save_tokenizer(folder)
        return Path(folder)

    return make
