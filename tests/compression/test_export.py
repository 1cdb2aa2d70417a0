"""The export proves itself: zeros, numbers and kernels, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import espalier
from espalier.compression.config import Config
from espalier.compression.export import check_place, export
from espalier.compression.pruner import Pruner
from espalier.compression.tasks import Classification, Embeddings, EncoderTask, QuestionAnswering, TokenClassification
from espalier.compression.tasks.models import load_encoder
from espalier.data import Tokens
from espalier.errors import ExportError, InputError

MakeFolder = Callable[..., Path]


def pruned(task: EncoderTask, folder: Path, sparsity: float = 0.85) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = task.load(folder)
    pruner = Pruner(model, Config(sparsity=sparsity, pattern="unstructured", score="magnitude"))
    pruner.prune(sparsity, list, lambda model, batch: torch.zeros(()))
    return model, pruner.masks


@pytest.fixture
def task(encoder_folder: Path, texts_file: Path) -> Embeddings:
    task = Embeddings(Tokens.read(encoder_folder, 24))
    task.read([texts_file])
    return task


def test_a_folder_and_an_onnx_file(task: Embeddings, encoder_folder: Path, tmp_path: Path) -> None:
    model, masks = pruned(task, encoder_folder)
    done = export(model, task, encoder_folder, tmp_path / "out", masks, samples=task.training, tune=False)
    assert all(check.ok for check in done.checks)
    assert len(done.checks) == 6
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "model.onnx", "tokenizer.json", "modules.json"} <= names
    assert "1_Pooling/config.json" in names
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in masks.items():
        assert bool((stored[f"{name}.weight"][~mask] == 0).all())
    assert set(done.formats.values()) <= {"unstructured", "4x1"}
    # Both are what other programs load.
    again, notes = load_encoder(tmp_path / "out", "AutoModel", attention=False)
    assert notes == []
    ids = torch.tensor([task.training[0].ids.tolist()])
    with torch.no_grad():
        want = again(input_ids=ids).last_hidden_state.mean(1)
    session = espalier.load(tmp_path / "out" / "model.onnx", tune=False, threads=1)
    (vectors,) = session.run_ragged(["sentence_embedding"], [ids[0].numpy()])
    np.testing.assert_allclose(vectors[0], torch.nn.functional.normalize(want)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (QuestionAnswering, "ForQuestionAnswering"),
        (Classification, "ForSequenceClassification"),
        (TokenClassification, "ForTokenClassification"),
    ],
)
def test_every_head(
    kind: type[EncoderTask], head: str, make_folder: MakeFolder, task: Embeddings, tmp_path: Path
) -> None:
    folder = make_folder(head)
    other = kind(Tokens.read(folder, 96))
    if isinstance(other, Classification | TokenClassification):
        other.labels = ("LABEL_0", "LABEL_1")
    model, masks = pruned(other, folder)
    done = export(model, other, folder, tmp_path / "out", masks, samples=task.training, tune=False)
    assert all(check.ok for check in done.checks)
    assert not (tmp_path / "out" / "modules.json").exists()


def test_zeros_that_are_lost(task: Embeddings, encoder_folder: Path, tmp_path: Path) -> None:
    model, masks = pruned(task, encoder_folder)
    name, mask = next(iter(masks.items()))
    with torch.no_grad():
        model.get_submodule(name).weight[~mask] = 1e-30
    with pytest.raises(ExportError, match=f"zeros kept: 1 layers .* first {name}"):
        export(model, task, encoder_folder, tmp_path / "out", masks, samples=task.training, tune=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_layers_that_do_not_run_sparse(
    task: Embeddings, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier.compiler import formats

    model, masks = pruned(task, encoder_folder)

    def dense(tuner: formats.Tuner, key: str, ranked: list[formats.Candidate]) -> formats.Choice:
        found = next(candidate for candidate in ranked if candidate.format == "dense")
        return formats.Choice("dense", found.chunk, False, found.pack())

    monkeypatch.setattr(formats.Tuner, "choose", dense)
    with pytest.raises(ExportError, match=r"sparse kernels, folder: .*dense, 8.% zeros"):
        export(model, task, encoder_folder, tmp_path / "out", masks, samples=task.training, tune=False)


def test_other_numbers(task: Embeddings, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pruned(task, encoder_folder)
    from espalier.session import Session

    run = Session.run_ragged
    monkeypatch.setattr(
        Session, "run_ragged", lambda self, names, rows: [[r + 0.01 for r in part] for part in run(self, names, rows)]
    )
    with pytest.raises(ExportError, match=r"numbers, folder: relative error 1\.0e-02"):
        export(model, task, encoder_folder, tmp_path / "out", masks, samples=task.training, tune=False)


def test_places_that_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    check_place(tmp_path / "new", [encoder_folder], resume=False)
    for place in (encoder_folder, encoder_folder.parent, encoder_folder / "sub"):
        with pytest.raises(InputError, match="input"):
            check_place(place, [encoder_folder], resume=True)
    (tmp_path / "link").symlink_to(encoder_folder)
    with pytest.raises(InputError, match="is or holds the input"):
        check_place(tmp_path / "link", [encoder_folder], resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        check_place(tmp_path / "full", [encoder_folder], resume=False)
    check_place(tmp_path / "full", [encoder_folder], resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_place(tmp_path / "file", [encoder_folder], resume=False)
