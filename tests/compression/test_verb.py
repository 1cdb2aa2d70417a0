"""The verb, from a folder to a verified folder, and on any module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier
from espalier.compression.compress import Data, compress
from espalier.compression.config import Config, Recovery, Schedule, Training
from espalier.compression.defaults import defaults, merged
from espalier.compression.progress import Monitor
from espalier.compression.report import CompressionReport
from espalier.compression.tasks import Columns
from espalier.errors import ConfigError, InputError, ModelNotFoundError

MakeFolder = Callable[..., Path]
TRAINING = Training(steps=6, batch_tokens=128, checkpoint_every=3, max_length=100)


class Silent(Monitor):
    """Remembers the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def test_embeddings_from_folder_to_folder(
    encoder_folder: Path, texts_file: Path, pairs_file: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in encoder_folder.iterdir() if p.is_file()}
    config = Config(
        sparsity=0.8,
        pattern="unstructured",
        score="magnitude",
        schedule=Schedule(kind="gradual", steps=2, end=0.5),
        recovery=Recovery(task=0, hidden=1, embeddings=1),
        training=TRAINING,
    )
    monitor = Silent()
    report = compress(
        encoder_folder,
        config,
        task="embeddings",
        data=Data(training=(texts_file,), evaluation=pairs_file),
        output=tmp_path / "out",
        monitor=monitor,
    )
    assert report.sparsity == pytest.approx(0.8, abs=0.01)
    assert report.dense is not None
    assert report.compressed is not None
    assert report.dense.count == 20
    assert report.speed is not None
    assert report.speed.ratio > 0
    assert len(report.layers) == 12
    assert all(layer.format in ("unstructured", "4x1") for layer in report.layers)
    assert all(layer.sparse_ms for layer in report.layers)
    assert "exporting and verifying" in monitor.stages
    assert {p.name: p.read_bytes() for p in encoder_folder.iterdir() if p.is_file()} == before
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["history"]["step"] == 6
    assert not (tmp_path / "out" / "checkpoints").exists()
    for name in (".", "model.onnx"):
        session = espalier.load(tmp_path / "out" / name, tune=False, threads=1)
        assert session.run_ragged(["sentence_embedding"], [[2, 9, 3]])[0][0].shape == (32,)


def test_question_answering_dense_then_sparse(encoder_folder: Path, squad_file: Path, tmp_path: Path) -> None:
    """Fine-tuning is the same run without pruning, and its result is what is pruned next."""
    data = Data(training=(squad_file,), evaluation=squad_file)
    dense = Config.from_dict(
        merged(
            defaults("question-answering", sparse=False),
            {"training": {"steps": 60, "max_length": 96, "batch_tokens": 512, "learning_rate": 3e-3}},
        )
    )
    first = compress(
        encoder_folder, dense, task="question-answering", data=data, output=tmp_path / "dense", monitor=Monitor()
    )
    assert first.sparsity == 0
    assert first.layers == ()
    assert first.compressed is not None
    assert "new, untrained parameters" in first.notes[0]
    sparse = Config.from_dict(
        merged(
            defaults("question-answering", sparse=True),
            {
                "sparsity": 0.7,
                "pattern": "unstructured",
                "score": "magnitude",
                "training": {"steps": 5, "max_length": 96, "batch_tokens": 512},
            },
        )
    )
    second = compress(
        tmp_path / "dense",
        sparse,
        task="question-answering",
        data=data,
        output=tmp_path / "sparse",
        measure=False,
        monitor=Monitor(),
    )
    assert second.dense is not None
    assert second.dense.value == pytest.approx(first.compressed.value)
    assert second.speed is None
    session = espalier.load(tmp_path / "sparse" / "model.onnx", tune=False, threads=1)
    assert [info.name for info in session.get_outputs()] == ["start_logits", "end_logits"]
    with pytest.raises(ConfigError, match="no trained head"):
        compress(encoder_folder, sparse, task="question-answering", data=data, output=tmp_path / "x", monitor=Monitor())


def test_an_interrupted_run_is_resumed(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    config = Config(
        sparsity=0.8, pattern="unstructured", score="magnitude", recovery=Recovery(task=0), training=TRAINING
    )

    def run(output: Path, monitor: Monitor, *, resume: bool = False) -> None:
        compress(
            encoder_folder,
            config,
            task="embeddings",
            data=Data(training=(texts_file,)),
            output=output,
            measure=False,
            resume=resume,
            monitor=monitor,
        )

    run(tmp_path / "whole", Monitor())

    # Interrupted so hard that only the checkpoint of step 3 remains.
    class StopLate(Monitor):
        def step(self, status: object) -> None:
            if getattr(status, "step", 0) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", StopLate())
    with pytest.raises(InputError, match="is not empty"):
        run(tmp_path / "broken", Monitor())
    run(tmp_path / "broken", Monitor(), resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_neurons_shrink_the_folder(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    config = Config(sparsity=0.3, pattern="neurons", score="magnitude", recovery=Recovery(task=0), training=TRAINING)
    report = compress(
        encoder_folder,
        config,
        task="embeddings",
        data=Data(training=(texts_file,)),
        output=tmp_path / "out",
        measure=False,
        monitor=Monitor(),
    )
    assert any("parameters are gone" in note for note in report.history.notes)
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "out", encoder_folder)]
    assert sizes[0] < sizes[1]


def test_dropped_layers_survive_an_interruption(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    config = Config(sparsity=0.5, pattern="layers", score="wanda", recovery=Recovery(task=0), training=TRAINING)

    class StopLate(Monitor):
        def step(self, status: object) -> None:
            if getattr(status, "step", 0) == 4:
                raise KeyboardInterrupt

    def run(monitor: Monitor, *, resume: bool) -> CompressionReport:
        return compress(
            encoder_folder,
            config,
            task="embeddings",
            data=Data(training=(texts_file,)),
            output=tmp_path / "out",
            measure=False,
            resume=resume,
            monitor=monitor,
        )

    with pytest.raises(KeyboardInterrupt):
        run(StopLate(), resume=False)
    report = run(Monitor(), resume=True)
    assert report.history.step == 6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    assert len(report.checks) == 2  # the numbers, from both files: what is left of the layers has no zeros


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("DistilBert", {}),
        ("Electra", {"embedding_size": 16}),
        ("MPNet", {"pad_token_id": 1}),
        ("Roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    ],
)
def test_other_families(
    family: str, settings: dict[str, int], make_folder: MakeFolder, texts_file: Path, tmp_path: Path
) -> None:
    folder = make_folder(family=family, **settings)
    config = Config(
        sparsity=0.8, pattern="unstructured", score="magnitude", recovery=Recovery(task=0), training=TRAINING
    )
    report = compress(
        folder,
        config,
        task="embeddings",
        data=Data(training=(texts_file,)),
        output=tmp_path / "out",
        measure=False,
        monitor=Monitor(),
    )
    assert len(report.layers) == 12
    assert report.notes == ()
    assert len(report.checks) == 6


def test_a_module_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    report = compress(
        model, Config(sparsity=0.5, pattern="unstructured", score="magnitude", include=(".",)), monitor=Monitor()
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert float((model[0].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert "no batches were given" in report.history.notes[0]
    batches = [torch.randn(4, 16) for _ in range(3)]
    trained = compress(
        model,
        Config(sparsity=0.75, pattern="unstructured", score="magnitude", include=(".",), training=Training(epochs=2)),
        batches=batches,
        loss=lambda m, x: m(x).pow(2).mean(),
        monitor=Monitor(),
    )
    assert trained.history.step == 6
    assert trained.sparsity == pytest.approx(0.75, abs=0.01)


def test_calls_that_make_no_sense(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    module, sparse = nn.Linear(4, 4), Config(sparsity=0.5, score="magnitude")
    quiet, data = Monitor(), Data(training=(texts_file,))
    with pytest.raises(InputError, match="go with a model folder"):
        compress(module, sparse, task="embeddings", monitor=quiet)
    with pytest.raises(InputError, match="give batches and loss together"):
        compress(module, sparse, batches=[1], monitor=quiet)
    with pytest.raises(InputError, match="nothing to do"):
        compress(module, Config(), monitor=quiet)
    with pytest.raises(InputError, match="needs a task and an output"):
        compress(encoder_folder, sparse, monitor=quiet)
    with pytest.raises(ConfigError, match="unknown task 'translate'"):
        compress(encoder_folder, sparse, task="translate", data=data, output=tmp_path / "o", monitor=quiet)
    with pytest.raises(ModelNotFoundError):
        compress(tmp_path / "no", sparse, task="embeddings", data=data, output=tmp_path / "o", monitor=quiet)
    labels = Config(sparsity=0.5, recovery=Recovery(task=1))
    with pytest.raises(ConfigError, match=r"set recovery\.task to 0"):
        compress(encoder_folder, labels, task="embeddings", data=data, output=tmp_path / "o", monitor=quiet)
    wrong = Data(training=(texts_file,), guessed=texts_file, columns=Columns())
    with pytest.raises(ConfigError, match="guessed starts"):
        compress(encoder_folder, sparse, task="embeddings", data=wrong, output=tmp_path / "o", monitor=quiet)
    with pytest.raises(InputError, match="is or holds the input"):
        compress(encoder_folder, sparse, task="embeddings", data=data, output=encoder_folder, monitor=quiet)
    assert not (tmp_path / "o").exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(
    encoder_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "log.jsonl").write_text("{}\n")
    config = Config(sparsity=0.7, pattern="unstructured", score="magnitude", recovery=Recovery(task=0), threads=1)
    compress(
        encoder_folder,
        config,
        task="embeddings",
        data=Data(training=(texts_file,)),
        output=tmp_path / "out",
        measure=False,
        monitor=Monitor(),
    )
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "{}\n" not in (tmp_path / "out" / "log.jsonl").read_text()
