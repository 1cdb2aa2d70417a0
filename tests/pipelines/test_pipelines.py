"""Pipelines: the right outputs of a model, and the task's own result of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from espalier.data import Answer, Question
from espalier.errors import InputError, UnsupportedModelError
from espalier.pipelines import Embeddings, QuestionAnswering
from espalier.session import load

torch = pytest.importorskip("torch", reason="makes the random models")
transformers = pytest.importorskip("transformers", reason="makes the random models")


@pytest.fixture
def make(tmp_path: Path, save_tokenizer: Callable[[Path], None]) -> Callable[[str], Path]:
    """``make("BertModel")``: a tiny random model of that class, with a tokenizer."""

    def save(name: str) -> Path:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=65, max_position_embeddings=384, **sizes)
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        return tmp_path / name

    return save


def test_an_answer_is_the_best_span_of_the_context(make: Callable[[str], Path]) -> None:
    folder = make("BertForQuestionAnswering")
    pipeline = QuestionAnswering.load(folder, threads=1, tune=False)
    question = Question("q", "w1 w2", "w3 w4 w5 w6", (Answer("w3", 0),))
    (answer,) = pipeline.answer([question])
    ids = pipeline.tokens.tokenizer.encode("w1 w2", "w3 w4 w5 w6")
    model = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids.ids]), token_type_ids=torch.tensor([ids.type_ids]))
    starts, ends = out.start_logits[0, 4:8].numpy(), out.end_logits[0, 4:8].numpy()
    begin, end = max(((b, e) for b in range(4) for e in range(b, 4)), key=lambda span: starts[span[0]] + ends[span[1]])
    assert answer == " ".join(f"w{3 + i}" for i in range(begin, end + 1))


def test_embeddings_have_length_one_and_are_the_mean_of_tokens(make: Callable[[str], Path]) -> None:
    folder = make("BertModel")
    pipeline = Embeddings.load(folder, threads=1, tune=False)
    found = pipeline.embed(["w1 w2 w3", "w4"])
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1], abs=1e-5)
    ids = pipeline.tokens.tokenizer.encode("w4").ids
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    assert found[1] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_a_model_with_another_head_is_refused(make: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="question answering needs a model with the outputs start_logits"):
        QuestionAnswering.load(make("BertModel"), threads=1, tune=False)


def test_without_a_tokenizer_there_are_no_texts(make: Callable[[str], Path]) -> None:
    pipeline = Embeddings(load(make("BertModel"), threads=1, tune=False), None)
    with pytest.raises(InputError, match="takes features, not texts"):
        pipeline.embed(["w1"])
