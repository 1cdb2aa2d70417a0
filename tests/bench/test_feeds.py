"""Inputs made up from a model's description."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from espalier.bench import InputLimits, limits_of, make_feeds, read_feeds
from espalier.errors import InputError, InputNameError, InputShapeError, InputTypeError
from espalier.ir.graph import Graph, Node, TensorType


@dataclass(frozen=True)
class Info:
    name: str
    shape: tuple[int | str | None, ...] = ("batch", "seq")
    type: str = "tensor(int64)"


BERT = [Info("input_ids"), Info("attention_mask"), Info("token_type_ids")]
LIMITS = InputLimits(ids={"input_ids": 50, "token_type_ids": 2}, length={"input_ids": 16})


def test_a_full_batch() -> None:
    feeds = make_feeds(BERT, LIMITS, batch=3, seq=16)
    assert {name: array.shape for name, array in feeds.padded.items()} == {info.name: (3, 16) for info in BERT}
    assert feeds.samples == 3
    assert feeds.tokens == 48
    ids = feeds.padded["input_ids"]
    assert ids.min() >= 4
    assert ids.max() < 50
    assert feeds.padded["attention_mask"].all()
    assert not feeds.padded["token_type_ids"].any()


def test_a_ragged_batch_counts_its_tokens_and_splits_into_sequences() -> None:
    feeds = make_feeds(BERT, LIMITS, batch=20, seq=16, ragged=True)
    lengths = feeds.padded["attention_mask"].sum(axis=1)
    assert lengths.max() == 16
    assert lengths.min() >= 4
    assert len(set(lengths)) > 3
    assert feeds.tokens == lengths.sum()
    sequences = feeds.sequences()
    assert [len(row["input_ids"]) for row in sequences] == list(lengths)
    assert all(set(row) == {info.name for info in BERT} for row in sequences)


def test_the_same_seed_makes_the_same_feeds() -> None:
    first, second, other = (make_feeds(BERT, LIMITS, batch=2, seq=8, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.padded["input_ids"], second.padded["input_ids"])
    assert (first.padded["input_ids"] != other.padded["input_ids"]).any()


def test_extents_of_the_model_win() -> None:
    feeds = make_feeds([Info("x", (2, 3, 8, 8), "tensor(float)")], InputLimits(), batch=9, seq=9)
    assert feeds.padded["x"].shape == (2, 3, 8, 8)
    assert feeds.padded["x"].dtype == np.float32
    assert (feeds.samples, feeds.tokens) == (2, None)


def test_ids_without_a_known_limit_stay_small() -> None:
    feeds = make_feeds([Info("tokens", type="tensor(int32)")], InputLimits(), batch=4, seq=32)
    assert feeds.padded["tokens"].max() <= 1
    assert feeds.padded["tokens"].dtype == np.int32


def test_a_vocabulary_of_one_word_is_enough() -> None:
    feeds = make_feeds([Info("input_ids")], InputLimits(ids={"input_ids": 1}), batch=2, seq=2)
    assert not feeds.padded["input_ids"].any()


def test_too_long_names_the_limit() -> None:
    with pytest.raises(InputShapeError, match="--seq 16 or less"):
        make_feeds(BERT, LIMITS, batch=1, seq=17)


def test_ragged_without_a_mask_is_refused() -> None:
    with pytest.raises(InputError, match="no attention mask"):
        make_feeds([Info("input_ids")], LIMITS, batch=1, seq=8, ragged=True)


def test_an_unknown_extent_points_to_inputs() -> None:
    with pytest.raises(InputShapeError, match="--inputs"):
        make_feeds([Info("image", ("batch", 3, "height", None), "tensor(float)")], InputLimits(), batch=1, seq=8)


def test_strings_cannot_be_made_up() -> None:
    with pytest.raises(InputTypeError, match="--inputs"):
        make_feeds([Info("text", type="tensor(string)")], InputLimits(), batch=1, seq=8)


def test_limits_come_from_the_tables() -> None:
    tables = {"words": np.zeros((30, 4), np.float32), "places": np.zeros((18, 4), np.float32)}
    nodes = [
        Node("Embedding", ["words", "ids"], ["a"]),
        Node("Positions", ["ids"], ["p"], {"offset": 2}),
        Node("Embedding", ["places", "p"], ["b"]),
    ]
    types = {"ids": TensorType("int64", ("batch", "seq"))}
    limits = limits_of(Graph("g", ["ids"], ["b"], nodes, tables, types))
    assert limits == InputLimits(ids={"ids": 30}, length={"ids": 16})


def test_feeds_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    np.savez(path, input_ids=mask * 5, attention_mask=mask, token_type_ids=mask * 0)
    feeds = read_feeds(path, BERT)
    assert feeds.samples == 2
    assert feeds.tokens == 3


def test_a_file_with_other_names_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", ids=np.zeros((1, 2)))
    with pytest.raises(InputNameError, match="input_ids"):
        read_feeds(tmp_path / "in.npz", BERT)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"numpy\.savez"):
        read_feeds(tmp_path / "in.npz", BERT)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="plain arrays"):
        read_feeds(tmp_path / "in.npz", BERT)
