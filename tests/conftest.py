"""Tiny tokenizers and data that several packages' tests share; nothing here needs PyTorch."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that frames texts as BERT does: words w0 to w59, everything else unknown."""
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], None]:
    """``save_tokenizer(folder)`` writes the word-level tokenizer of these tests as ``tokenizer.json``."""
    return _save_tokenizer


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The vocabulary of :func:`save_tokenizer`, special tokens first."""
    return SPECIAL + WORDS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    _save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., list[str]]:
    """``make_texts(count, seed)``: lines of 1 to 20 known words."""

    def make(count: int, seed: int = 0) -> list[str]:
        rng = random.Random(seed)
        return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(count)]

    return make


@pytest.fixture
def pairs_file(tmp_path: Path, make_texts: Callable[..., list[str]]) -> Path:
    """Pairs of texts with a score, without a header, as the STS benchmark has them."""
    path = tmp_path / "pairs.csv"
    rows = zip(make_texts(20, 1), make_texts(20, 2), range(20), strict=True)
    path.write_text("".join(f"{a},{b},{n / 4}\n" for a, b, n in rows))
    return path


def squad(questions: int = 12) -> dict[str, Any]:
    """A SQuAD file: the answer to the question "wN" is the two words after the word wN."""
    paragraphs = []
    for start in range(0, questions, 3):
        words = [WORDS[(start * 7 + i) % len(WORDS)] for i in range(30)]
        context = " ".join(words)
        qas = []
        for number in range(start, min(start + 3, questions)):
            at = 3 + 5 * (number - start)
            text = f"{words[at]} {words[at + 1]}"
            answer = {"text": text, "answer_start": len(" ".join(words[:at])) + 1}
            qas.append({"id": f"q{number}", "question": words[at - 1], "answers": [answer]})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


@pytest.fixture
def squad_file(tmp_path: Path) -> Path:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad()))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository (or ``ESPALIER_DATA``); tests that need it are skipped without."""
    place = Path(os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not place.is_dir():
        pytest.skip("no folder of real data: it lies in ../shared/data, or where ESPALIER_DATA says")
    return place
