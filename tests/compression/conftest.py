"""Tiny random encoders with a tokenizer of their own, and tiny data. Tests of compression share them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="compression is PyTorch's")
transformers = pytest.importorskip("transformers", reason="compression loads models with transformers")
tokenizers = pytest.importorskip("tokenizers", reason="compression reads tokenizer.json")

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that frames texts as BERT does: words w0 to w59, everything else unknown."""
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
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_folder(head, **settings)``: a saved tiny BERT, e.g. with the head ``ForQuestionAnswering``, or a model of
    another ``family``."""

    def make(
        head: str = "Model", *, family: str = "Bert", seed: int = 0, sentence: bool = False, **settings: Any
    ) -> Path:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        if family == "DistilBert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=128, **sizes, **settings
        )
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}{head}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Wide enough that a wrong kernel or a lost zero shows.
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.15)
        folder = tmp_path_factory.mktemp("model") / "tiny"
        model.save_pretrained(folder)
        save_tokenizer(folder)
        if sentence:
            kinds = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
            modules = [
                {"idx": int(n), "name": n, "path": path, "type": f"sentence_transformers.models.{kind}"}
                for n, path, kind in kinds
            ]
            (folder / "modules.json").write_text(json.dumps(modules))
            (folder / "1_Pooling").mkdir()
            pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return folder

    return make


@pytest.fixture(scope="session")
def encoder_folder(make_folder: Callable[..., Path]) -> Path:
    """A tiny encoder in the layout of sentence-transformers. Tests that change it copy it first."""
    return make_folder("Model", sentence=True)


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., list[str]]:
    """``make_texts(count, seed)``: lines of 1 to 20 known words."""
    import random

    def make(count: int, seed: int = 0) -> list[str]:
        rng = random.Random(seed)
        return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(count)]

    return make


@pytest.fixture
def texts_file(tmp_path: Path, make_texts: Callable[..., list[str]]) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(make_texts(60)) + "\n")
    return path


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
    import os

    place = Path(os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not place.is_dir():
        pytest.skip("no folder of real data: it lies in ../shared/data, or where ESPALIER_DATA says")
    return place
