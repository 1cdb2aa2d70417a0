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


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def make_folder(
    tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], None], words: list[str]
) -> Callable[..., Path]:
    """``make_folder(head, **settings)``: a saved tiny BERT, e.g. with the head ``ForQuestionAnswering``, or a model of
    another ``family``."""

    def make(
        head: str = "Model", *, family: str = "Bert", seed: int = 0, sentence: bool = False, **settings: Any
    ) -> Path:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        if family == "DistilBert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(words), max_position_embeddings=128, **sizes, **settings
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


@pytest.fixture
def texts_file(tmp_path: Path, make_texts: Callable[..., list[str]]) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(make_texts(60)) + "\n")
    return path
