"""Quantised models from folder to folder: trained, resumed, exported, read back, and run by the engine and others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import espalier
from espalier import hf
from espalier.compression.compress import Data, compress
from espalier.compression.config import Calibration, Config, Quantization, Recovery, Schedule, Training
from espalier.compression.progress import Monitor
from espalier.compression.quantization.linear import quantized_layers
from espalier.compression.report import CompressionReport
from espalier.errors import ConfigError, ExportError, InputError, UnsupportedModelError
from espalier.ir import reference
from espalier.ort import OrtProgram

DISTIL = Recovery(task=0, hidden=1, embeddings=1)
ONCE = Training(max_length=100, batch_tokens=128)
LONG = replace(ONCE, steps=8, checkpoint_every=3)
INT8 = Quantization(accuracy_target=0)


def run(folder: Path, texts: Path, output: Path, *, pairs: Path | None = None, **settings: Any) -> CompressionReport:
    resume, monitor = settings.pop("resume", False), settings.pop("monitor", Monitor())
    base = {"recovery": DISTIL, "training": ONCE, "quantization": INT8, "calibration": Calibration(batches=4)}
    return compress(
        folder,
        Config(**{**base, **settings}),
        task="embeddings",
        data=Data(training=(texts,), evaluation=pairs),
        output=output,
        measure=False,
        resume=resume,
        monitor=monitor,
    )


def run_onnx(path: Path, feeds: dict[str, np.ndarray], output: str) -> np.ndarray:
    program = OrtProgram(path, threads=1, exact=True)
    known = {info.name for info in program.session.get_inputs()}
    (found,) = program.run([output], {name: array for name, array in feeds.items() if name in known})
    return np.asarray(found)


@pytest.mark.parametrize("activations", ["static", "dynamic", "auto"])
def test_a_dense_model_is_quantised_as_it_is(
    activations: str, encoder_folder: Path, texts_file: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = Quantization(activations=activations, accuracy_target=0)
    report = run(encoder_folder, texts_file, out, pairs=pairs_file, quantization=settings)
    assert report.quantization is not None
    assert len(report.quantization.layers) == 12
    assert report.sparsity < 0.001
    assert {layer.pattern for layer in report.layers} == {"as given"}
    assert report.recovered is not None
    assert sum("12 of 12 quantised layers run with integers" in check for check in report.checks) == 2
    assert any("12 int8 layers with equal integers" in check for check in report.checks)
    assert "## Quantisation" in (out / "report.md").read_text()
    saved = json.loads((out / "report.json").read_text())["quantization"]
    assert saved["fidelity"] > 0.98
    # Everybody says nearly the same: the folder and the ONNX file in the engine, ONNX Runtime, and the dialect itself.
    ids = np.array([[2, 9, 17, 33, 8, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    said = [
        espalier.load(out, tune=False, threads=1).run(["sentence_embedding"], feeds)[0],
        espalier.load(out / "model.onnx", tune=False, threads=1).run(["sentence_embedding"], feeds)[0],
        reference.run(hf.read(out), feeds)["sentence_embedding"],
        run_onnx(out / "model.onnx", feeds, "sentence_embedding"),
    ]
    dense = espalier.load(encoder_folder, tune=False, threads=1).run(["sentence_embedding"], feeds)[0]
    noise = max(float(np.abs(vector - dense).max()) for vector in said)
    assert 1e-4 < noise < 0.05
    for vector in said[1:]:
        np.testing.assert_allclose(vector, said[0], atol=noise)


def test_pruned_and_quantised_with_training_in_between(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    report = run(
        encoder_folder,
        texts_file,
        tmp_path / "out",
        sparsity=0.8,
        pattern="1x4",
        score="magnitude",
        schedule=Schedule(kind="gradual", steps=2, end=0.4),
        training=LONG,
        quantization=replace(INT8, finetune=0.5, smooth=0.5, rounding="gptq"),
    )
    assert report.sparsity == pytest.approx(0.8, abs=0.01)
    assert report.quantization is not None
    assert report.history.step == 8
    assert any("LayerNorm" in note for note in report.history.notes)
    graph = hf.read(tmp_path / "out")
    for node in graph.nodes:
        if node.op == "QLinear":
            blocks = np.asarray(graph.constants[node.inputs[1]]).reshape(-1, 4)
            assert (blocks == 0).all(1).mean() == pytest.approx(0.8, abs=0.02)


def test_a_pruned_folder_keeps_its_zeros(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    run(encoder_folder, texts_file, sparse, quantization=None, sparsity=0.7, pattern="unstructured", score="magnitude")
    report = run(sparse, texts_file, tmp_path / "out", training=LONG, quantization=replace(INT8, finetune=1.0))
    assert report.sparsity == pytest.approx(0.7, abs=0.01)
    with pytest.raises(UnsupportedModelError, match="is quantised already"):
        run(tmp_path / "out", texts_file, tmp_path / "again")


@pytest.mark.parametrize("stop", [5, 8])
def test_resume_continues_bit_for_bit(stop: int, encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    class StopLate(Monitor):
        def step(self, status: object) -> None:
            if getattr(status, "step", 0) == stop:
                raise KeyboardInterrupt

    settings = {"training": replace(LONG, checkpoint_every=2), "quantization": replace(INT8, finetune=0.5)}
    run(encoder_folder, texts_file, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(encoder_folder, texts_file, tmp_path / "broken", monitor=StopLate(), **settings)
    run(encoder_folder, texts_file, tmp_path / "broken", resume=True, **settings)
    whole, broken = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken"))
    assert whole == broken


@pytest.mark.parametrize(
    ("family", "settings"),
    [("DistilBert", {}), ("Electra", {"embedding_size": 16}), ("MPNet", {"pad_token_id": 1})],
)
def test_other_families(
    family: str, settings: dict[str, int], make_folder: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    report = run(make_folder(family=family, **settings), texts_file, tmp_path / "out")
    assert report.quantization is not None
    assert report.quantization.count("float") == 0


def test_structured_patterns_shrink_before_they_are_written(
    encoder_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    for pattern, sparsity, score in (("neurons", 0.3, "magnitude"), ("layers", 0.5, "wanda")):
        report = run(encoder_folder, texts_file, tmp_path / pattern, sparsity=sparsity, pattern=pattern, score=score)
        assert report.quantization is not None
        assert len(report.quantization.layers) == (12 if pattern == "neurons" else 6)


def test_question_answering(make_folder: Callable[..., Path], squad_file: Path, tmp_path: Path) -> None:
    report = compress(
        make_folder("ForQuestionAnswering"),
        Config(training=replace(ONCE, max_length=96), quantization=INT8, calibration=Calibration(batches=2)),
        task="question-answering",
        data=Data(training=(squad_file,), evaluation=squad_file),
        output=tmp_path / "out",
        measure=False,
        monitor=Monitor(),
    )
    assert report.quantization is not None
    assert report.quantization.fidelity is not None
    assert report.quantization.fidelity > 0.9
    assert hf.read(tmp_path / "out").outputs == ["start_logits", "end_logits"]


def test_integers_that_are_lost(
    encoder_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier.compression.quantization import checkpoint
    from espalier.compression.tasks import models

    def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
        found = checkpoint.tensors_of(model)
        name = next(iter(quantized_layers(model)))
        found[f"{name}.weight"] = -found[f"{name}.weight"]
        return found

    monkeypatch.setattr(models, "tensors_of", shifted)
    with pytest.raises(ExportError, match="integers, folder: 12 int8 layers for 12, 1 without an equal one"):
        run(encoder_folder, texts_file, tmp_path / "out")


def test_a_module_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    config = Config(quantization=INT8, include=(".",), calibration=Calibration(batches=2))
    batches = [torch.randn(20, 16) for _ in range(4)]
    report = compress(model, config, batches=batches, loss=lambda m, x: (m(x) ** 2).mean(), monitor=Monitor())
    assert report.quantization is not None
    assert report.quantization.fidelity is not None
    assert report.quantization.fidelity > 0.999
    assert list(quantized_layers(model)) == ["0", "2"]
    with pytest.raises(InputError, match="quantisation needs batches"):
        compress(nn.Sequential(nn.Linear(4, 4)), config, monitor=Monitor())


def test_settings_that_make_no_sense() -> None:
    for settings, words in (
        ({"scheme": "int4"}, "scheme must be one of int8"),
        ({"activations": "sometimes"}, "activations must be one of"),
        ({"range": "max"}, "range must be one of"),
        ({"percentile": 50}, "percentile must be above 50"),
        ({"smooth": 1.5}, "smooth must be at least 0, at most 1"),
        ({"keep_float": ("(",)}, "not a regular expression"),
        ({"finetune": -1}, "finetune must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            Quantization(**settings)
    with pytest.raises(ConfigError, match=r"speedup .* does not go with quantization"):
        Config(speedup=3, quantization=Quantization())
    with pytest.raises(ConfigError, match=r"begins before the last pruning, when 0\.6 .* at most 0\.4"):
        Config(sparsity=0.5, schedule=Schedule(kind="gradual"), quantization=Quantization(finetune=0.5))
    with pytest.raises(ConfigError, match="Quantization has no field 'smoth'; did you mean 'smooth'"):
        Config.from_dict({"quantization": {"smoth": 1}})
    config = Config(quantization=Quantization(keep_float=("a",)))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.keeps_zeros
    assert not Config(sparsity=0.5, quantization=Quantization()).keeps_zeros
