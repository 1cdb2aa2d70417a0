"""Tasks: what they make of data, their losses and their figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from espalier.compression.tasks import (
    Classification,
    Columns,
    Embeddings,
    QuestionAnswering,
    Scores,
    TokenClassification,
    Wants,
    recovery_interval,
)
from espalier.compression.tasks.models import load_encoder, pooling_of
from espalier.compression.tasks.tokens import spans
from espalier.data import Tokens
from espalier.data.metrics import mean_of, spearman
from espalier.errors import ConfigError, DataError, InputError, ModelFormatError, UnsupportedModelError

MakeFolder = Callable[..., Path]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_spearman_with_ties() -> None:
    a, b = np.array([1.0, 2, 2, 3, 5]), np.array([2.0, 1, 4, 4, 9])
    # Pearson's correlation of the mean ranks, by hand: 1, 2.5, 2.5, 4, 5 and 2, 1, 3.5, 3.5, 5.
    assert spearman(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4, 5], [2, 1, 3.5, 3.5, 5])[0, 1])
    assert spearman(a, -b) == pytest.approx(-spearman(a, b))
    assert np.isnan(spearman(a, np.ones(5)))


def test_intervals() -> None:
    values = np.random.default_rng(0).random(400)
    metric = Scores("accuracy", 400, mean_of(values)).metric()
    assert metric.low < metric.value < metric.high
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.2)
    worse = Scores("accuracy", 400, mean_of(values * 0.9))
    both = recovery_interval(worse, Scores("accuracy", 400, mean_of(values)))
    assert both.low == pytest.approx(0.9)  # paired: the same examples cancel
    with pytest.raises(InputError, match="400 and 3"):
        recovery_interval(worse, Scores("accuracy", 3, mean_of(values)))


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_embeddings(encoder_folder: Path, texts_file: Path, pairs_file: Path, squad_file: Path) -> None:
    task = Embeddings(Tokens.read(encoder_folder, 24))
    task.read([texts_file, texts_file, squad_file, pairs_file])
    assert len(task.training) == len({f.ids.tobytes() for f in task.training})
    task.read_evaluation(pairs_file)
    model = task.load(encoder_folder)
    scores = task.evaluate(model)
    assert scores is not None
    assert (scores.name, scores.count) == ("spearman", 20)
    assert -1 <= scores.value <= 1


def test_embeddings_do_not_depend_on_the_batch(encoder_folder: Path, texts_file: Path) -> None:
    task = Embeddings(Tokens.read(encoder_folder, 24))
    task.read([texts_file])
    model = task.load(encoder_folder).eval()
    together = task.embed(model, task.training)
    alone = np.concatenate([task.embed(model, [feature]) for feature in task.training])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


def test_the_pruning_loss_of_embeddings_has_a_gradient_and_repeats(encoder_folder: Path, texts_file: Path) -> None:
    task = Embeddings(Tokens.read(encoder_folder, 24))
    task.read([texts_file])
    model = task.load(encoder_folder).eval()
    batch = task.batch(task.epoch(256, seed=0, epoch=0)[0])
    losses = [task.pruning_loss(model, batch) for _ in range(2)]
    assert float(losses[0].detach()) == float(losses[1].detach())
    losses[0].backward()
    assert float(model.encoder.layer[0].output.dense.weight.grad.abs().sum()) > 0
    with pytest.raises(ConfigError, match="has no labels"):
        task.loss(model, batch)


def test_pairs_that_are_wrong(encoder_folder: Path, tmp_path: Path) -> None:
    task = Embeddings(Tokens.read(encoder_folder, 24))
    (tmp_path / "a.csv").write_text("a,b\nc,d\n")
    with pytest.raises(DataError, match="expected two texts and a score"):
        task.read_evaluation(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("a,b,1\nc,d,high\n")
    with pytest.raises(DataError, match=r"b\.csv:2: column '2' must hold a number, got 'high'"):
        task.read_evaluation(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("a,b,1\nc,d,1\n")
    with pytest.raises(DataError, match="all scores are 1"):
        task.read_evaluation(tmp_path / "c.csv")


def test_pooling(make_folder: MakeFolder, encoder_folder: Path) -> None:
    assert pooling_of(encoder_folder) == "mean"
    other = make_folder("Model", sentence=True)
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert pooling_of(other) == "cls"
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(UnsupportedModelError, match="expected the pooling mode mean or cls"):
        pooling_of(other)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_new_head_is_noted_and_repeats(encoder_folder: Path) -> None:
    first, second = (QuestionAnswering(Tokens.read(encoder_folder, 96), seed=s).load(encoder_folder) for s in (5, 5))
    torch.testing.assert_close(first.qa_outputs.weight, second.qa_outputs.weight, rtol=0, atol=0)
    _, notes = load_encoder(encoder_folder, "AutoModelForQuestionAnswering", attention=False)
    assert "qa_outputs.weight" in notes[0]


def test_no_random_pooler(make_folder: MakeFolder) -> None:
    folder = make_folder("ForQuestionAnswering")  # saved without a pooler
    model, notes = load_encoder(folder, "AutoModel", attention=False)
    assert model.pooler is None
    assert notes == []


def test_folders_that_are_wrong(make_folder: MakeFolder) -> None:
    folder = make_folder("Model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelFormatError, match="the weights lack"):
        load_encoder(folder, "AutoModel", attention=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="Python pickle"):
        load_encoder(folder, "AutoModel", attention=False)


# --- question answering -----------------------------------------------------------------------------------------------


def test_guessed_answers_are_not_learned(encoder_folder: Path, squad_file: Path, tmp_path: Path) -> None:
    (tmp_path / "guessed.json").write_text(json.dumps([["q1", 0], ["q2", 0]]))
    task = QuestionAnswering(Tokens.read(encoder_folder, 96), guessed=tmp_path / "guessed.json")
    task.read([squad_file])
    assert len(task.training) == 10


def test_question_answering_learns(encoder_folder: Path, squad_file: Path) -> None:
    task = QuestionAnswering(Tokens.read(encoder_folder, 96))
    task.read([squad_file])
    task.read_evaluation(squad_file)
    model = task.load(encoder_folder)
    batch = task.batch(np.arange(12))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    scores = task.evaluate(model)
    assert scores is not None
    assert scores.value > 0.9
    assert scores.details["exact match"] > 0.8


def test_max_length_without_room(encoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no room"):
        QuestionAnswering(Tokens.read(encoder_folder, 66))
    task = Embeddings(Tokens.read(encoder_folder, 200))
    with pytest.raises(ConfigError, match="exceeds the 128 positions"):
        task.load(encoder_folder)


# --- classes ----------------------------------------------------------------------------------------------------------


def write_classes(path: Path, count: int = 40, names: tuple[str, str] = ("no", "yes")) -> Path:
    rows = [f"w{i % 7} w{i % 5} {'w50' if i % 2 else 'w51'},{names[i % 2]}" for i in range(count)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def test_classification_learns(encoder_folder: Path, tmp_path: Path) -> None:
    path = write_classes(tmp_path / "a.csv")
    task = Classification(Tokens.read(encoder_folder, 24))
    task.read([path])
    task.read_evaluation(path)
    model = task.load(encoder_folder)
    assert model.config.id2label == {0: "no", 1: "yes"}
    batch = task.batch(np.arange(40))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    scores = task.evaluate(model)
    assert scores is not None
    assert scores.value > 0.9
    assert 0.9 < scores.details["macro F1"] <= 1


def test_a_trained_head_keeps_its_classes(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("ForSequenceClassification", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    task = Classification(Tokens.read(folder, 24))
    path = write_classes(tmp_path / "a.csv")
    task.read([path])
    task.read_evaluation(path)
    task.load(folder)
    assert task.labels == ("yes", "no")
    assert [int(f.target["label"]) for f in task.training[:2]] == [1, 0]
    other = Classification(Tokens.read(folder, 24))
    other.read([write_classes(tmp_path / "b.csv", names=("bad", "good"))])
    with pytest.raises(DataError, match="the model has the classes yes, no, the data also bad, good"):
        other.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\nb,x\n", "every example has the label 'x'"),
        ("text,kind\na,x\nb,y\n", "expected one or two texts and a label"),
        ("text,label\na,x\nb,\n", r"a\.csv:3: column 'label' must hold a class"),
        ("text,label\n,x\nb,y\n", r"a\.csv:2: column 'text' must hold a text"),
        ("text,label\n" + "".join(f"a,{n}\n" for n in range(99)), "99 different labels"),
    ],
)
def test_classes_that_are_wrong(encoder_folder: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    task = Classification(Tokens.read(encoder_folder, 24))
    with pytest.raises(DataError, match=message):
        task.read([tmp_path / "a.csv"])


def test_labels_only_in_held_out_data(encoder_folder: Path, tmp_path: Path) -> None:
    task = Classification(Tokens.read(encoder_folder, 24), columns=Columns(text=("text",), label="label"))
    task.read([write_classes(tmp_path / "a.csv")])
    (tmp_path / "b.csv").write_text("text,label\nw1,no\nw2,maybe\n")
    with pytest.raises(DataError, match=r"b\.csv:3: unknown label 'maybe'"):
        task.read_evaluation(tmp_path / "b.csv")


# --- words ------------------------------------------------------------------------------------------------------------


def write_tags(path: Path, count: int = 30) -> Path:
    """w1 and w2 begin and continue an entity."""
    tags = {"w1": "B-X", "w2": "I-X"}
    with path.open("w") as file:
        for i in range(count):
            words = [f"w{3 + i % 9}", "w1", "w2", f"w{20 + i % 5}"]
            if path.suffix == ".jsonl":
                file.write(json.dumps({"tokens": words, "tags": [tags.get(w, "O") for w in words]}) + "\n")
            else:
                file.write("".join(f"{w} {tags.get(w, 'O')}\n" for w in words) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.conll"])
def test_token_classification_learns(encoder_folder: Path, tmp_path: Path, name: str) -> None:
    path = write_tags(tmp_path / name)
    task = TokenClassification(Tokens.read(encoder_folder, 24))
    task.read([path])
    task.read_evaluation(path)
    model = task.load(encoder_folder)
    assert task.labels == ("B-X", "I-X", "O")
    batch = task.batch(np.arange(30))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    scores = task.evaluate(model)
    assert scores is not None
    assert scores.value > 0.9
    out = task.outputs(model, batch, Wants(hidden=True))
    assert len(out.hidden) == 3


def test_spans() -> None:
    assert spans(["B-X", "I-X", "O", "I-Y", "B-Y", "I-X"]) == {(0, 2, "X"), (3, 4, "Y"), (4, 5, "Y"), (5, 6, "X")}


def test_tags_that_are_wrong(encoder_folder: Path, tmp_path: Path) -> None:
    task = TokenClassification(Tokens.read(encoder_folder, 24))
    (tmp_path / "a.conll").write_text("w1 B-X\n\nw2\n")
    with pytest.raises(DataError, match=r"a\.conll:3: expected a word and its tag"):
        task.read([tmp_path / "a.conll"])
    (tmp_path / "a.jsonl").write_text('{"tokens": ["w1", "w2"], "tags": ["O"]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected as many tags as words"):
        task.read([tmp_path / "a.jsonl"])
