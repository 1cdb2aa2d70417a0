"""Reading: what is right is read exactly, what is wrong is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.data import (
    Template,
    Tokens,
    exact_match,
    f1,
    read_dataset,
    read_squad,
    read_table,
    read_texts,
)
from espalier.data.squad import is_squad, normalise
from espalier.errors import ConfigError, DataError


def test_texts_without_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two \nthree\xe2\x80\xa8still three")
    assert read_texts(tmp_path / "a.txt") == ["one", "two", "three\u2028still three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nb\xe9d\n", r"a\.txt:2: expected UTF-8, got the byte 0xe9"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"a\0b", r"a\.txt:1: expected text, got a zero byte"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "a.txt")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: No such file"):
        read_texts(tmp_path / "nothing.txt")


def test_tables_with_and_without_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\n"a, b",y\n')
    table = read_table(tmp_path / "a.csv", ("text", "label"))
    assert table.column("text") == ["two\nlines", "a, b"]
    assert [table.where(i).rsplit(":", 1)[1] for i in range(2)] == ["2", "4"]
    (tmp_path / "b.tsv").write_text("0.5\ta b\n1\tc\n")
    bare = read_table(tmp_path / "b.tsv")
    assert bare.columns == ("0", "1")
    assert bare.numbers("0") == [0.5, 1.0]
    (tmp_path / "c.csv").write_text("a,b\nc,d\n")
    assert len(read_table(tmp_path / "c.csv", ("0", "1"))) == 2


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "x", "n": 1}\n\n{"t": "y", "n": 2}\n')
    table = read_table(tmp_path / "a.jsonl", ("t",))
    assert table.texts("t") == ["x", "y"]
    assert table.where(1).endswith(":3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx\n", r"a\.csv:2: expected 2 fields, got 1"),
        ("a.csv", "text,label\n", "a header and nothing below"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.csv", 'text,label\n"x,y\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", "texts,label\na,b\n", "no column 'text'.*did you mean 'texts'"),
        ("a.jsonl", '{"text": "x"}\n{"text": }\n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: expected an object"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "x"}\n', r"a\.jsonl:2: expected the columns text, got txt"),
        ("a.doc", "x", "expected a file that ends in"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name, ("text",))


def test_columns_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nx,1\n ,nan\n")
    table = read_table(tmp_path / "a.csv", ("text", "n"))
    with pytest.raises(DataError, match=r"a\.csv:3: column 'text' must hold a text"):
        table.texts("text")
    with pytest.raises(DataError, match=r"a\.csv:3: column 'n' must hold a number, got 'nan'"):
        table.numbers("n")


def test_datasets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    table = pytest.importorskip("pyarrow").table({"text": ["a", "b"], "label": [1, 0]})
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    info = datasets.DatasetInfo(features=features)
    data = datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint="of-this-test")
    data.save_to_disk(str(tmp_path / "one"))
    assert read_dataset(tmp_path / "one").column("label") == ["yes", "no"]
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "many"))
    with pytest.raises(DataError, match="no split 'test'"):
        read_dataset(tmp_path / "many", "test")


# --- SQuAD ------------------------------------------------------------------------------------------------------------


def test_squad(squad_file: Path, tmp_path: Path) -> None:
    questions = read_squad(squad_file)
    assert len(questions) == 12
    first = questions[0].answers[0]
    assert first.start is not None
    assert questions[0].context[first.start :].startswith(first.text)
    (tmp_path / "guessed.json").write_text(json.dumps([["q1", 0]]))
    kept = read_squad(squad_file, guessed=tmp_path / "guessed.json")
    assert [q.answers[0].start is None for q in kept[:3]] == [False, True, False]
    assert is_squad(squad_file)
    assert not is_squad(tmp_path / "guessed.json")


def edit(content: dict[str, Any], change: str) -> None:
    paragraph = content["data"][0]["paragraphs"][0]
    if change == "moved":
        paragraph["qas"][1]["answers"][0]["answer_start"] = 0
    elif change == "empty":
        content["data"] = []
    elif change == "twice":
        paragraph["qas"][1]["id"] = "q0"
    elif change == "unanswered":
        paragraph["qas"][0]["answers"] = []
    else:
        del paragraph["context"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("moved", r"paragraphs\[0\].qas\[1\].answers\[0\]: expected 'w\d+ w\d+' at character 0"),
        ("empty", "there is no question"),
        ("twice", "the id 'q0' occurs twice"),
        ("unanswered", "has no answer"),
        ("no context", "'context' is a str"),
    ],
)
def test_squad_that_is_wrong(squad_file: Path, change: str, message: str) -> None:
    content = json.loads(squad_file.read_text())
    edit(content, change)
    squad_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_squad(squad_file)


def test_lists_of_guesses_that_are_wrong(squad_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "guessed.json"
    other.write_text('[["elsewhere", 0]]')
    with pytest.raises(DataError, match="the list of another file"):
        read_squad(squad_file, guessed=other)
    other.write_text('{"q0": 0}')
    with pytest.raises(DataError, match="expected a JSON list"):
        read_squad(squad_file, guessed=other)


def test_the_official_measures() -> None:
    assert normalise("The  Cat's, a  hat!") == "cats hat"
    assert exact_match("the Cat.", ["a cat", "dog"]) == 1.0
    assert f1("the black cat", ["cat", "a black dog"]) == pytest.approx(2 / 3)
    assert f1("the", ["a"]) == 0.0  # no word in common, as the official script counts it
    assert f1("x x y", ["x y y"]) == pytest.approx(2 / 3)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_frame_of_a_pair(tokenizer_folder: Path) -> None:
    tokens = Tokens.read(tokenizer_folder, 32)
    frame = Template.of(tokens.tokenizer)
    ids, types = frame.join(tokens.tokenizer.encode("w1 w2", add_special_tokens=False).ids, [7])
    whole = tokens.tokenizer.encode("w1 w2", "w2")
    assert ids.tolist() == whole.ids
    assert types.tolist() == whole.type_ids
    assert frame.overhead == 3


def test_encoding_is_cut_and_the_limit_checked(tokenizer_folder: Path) -> None:
    tokens = Tokens.read(tokenizer_folder, 5)
    ((ids, types),) = tokens.encode(["w1 w2 w3 w4 w5"])
    assert len(ids) == len(types) == 5
    assert ids[-1] == 3  # [SEP] is kept
    ids, _, owners = tokens.encode_words(["w1", "w2 w3", "w4"])
    assert owners == [None, 0, 1, 1, None]
    assert len(ids) == 5
    with pytest.raises(ConfigError, match="max_length must exceed"):
        Tokens.read(tokenizer_folder, 3)


def test_real_squad_has_the_published_counts(shared_data: Path) -> None:
    questions = read_squad(shared_data / "squad" / "dev-v1.1.rebuilt.json")
    assert len(questions) == 10570
    truths = [[a.text for a in q.answers] for q in questions]
    assert np.mean([f1(t[0], t) for t in truths]) == 1.0


def test_real_sentence_pairs(shared_data: Path) -> None:
    table = read_table(shared_data / "stsb" / "stsb-en-test.csv")
    assert table.columns == ("0", "1", "2")
    assert len(table) == 1379
    assert max(table.numbers("2")) == 5.0
