"""Texts in, answers out."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.data import Question
from espalier.pipelines import Embeddings, QuestionAnswering, TextClassification, TokenClassification, choose
from espalier.session import load

TEXTS = ["w1 w2 w3", "w4"]


def pipeline(models: dict[str, Path], name: str) -> Any:
    return choose(load(models[name], threads=1, tune=False), models[name])


def test_every_model_finds_its_task(models: dict[str, Path]) -> None:
    kinds = {name: type(pipeline(models, name)) for name in models if name != "plain"}
    assert kinds == {
        "embedder": Embeddings,
        "answerer": QuestionAnswering,
        "classifier": TextClassification,
        "labeller": TokenClassification,
    }
    assert choose(load(models["plain"], threads=1), models["plain"].parent) is None


def test_embeddings(client: Any, models: dict[str, Path]) -> None:
    expected = pipeline(models, "embedder").embed(TEXTS)
    status, found = client.post("/v1/embeddings", {"model": "embedder", "input": TEXTS})
    assert status == 200
    assert (found["object"], found["model"], found["data"][1]["index"]) == ("list", "embedder", 1)
    assert found["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    np.testing.assert_array_equal(np.array([row["embedding"] for row in found["data"]], np.float32), expected)
    encoded = {"model": "embedder", "input": TEXTS[0], "encoding_format": "base64"}
    data = client.post("/v1/embeddings", encoded)[1]["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(data), np.float32), expected[0])


def test_embeddings_of_token_ids(client: Any, models: dict[str, Path]) -> None:
    one = pipeline(models, "embedder")
    ids = [row.tolist() for row, _ in one.tokens.encode(TEXTS)]
    found = client.post("/v1/embeddings", {"model": "embedder", "input": ids})[1]
    np.testing.assert_array_equal(np.array([row["embedding"] for row in found["data"]], np.float32), one.embed(TEXTS))
    assert client.post("/v1/embeddings", {"model": "embedder", "input": ids[0]})[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        {"model": "embedder"},
        {"model": "embedder", "input": ""},
        {"model": "embedder", "input": []},
        {"model": "embedder", "input": ["w1", ""]},
        {"model": "embedder", "input": ["w1", 2]},
        {"model": "embedder", "input": [[]]},
        {"model": "embedder", "input": [-1]},
        {"model": "embedder", "input": [10**9]},
        {"model": "embedder", "input": [2**40]},
        {"model": "embedder", "input": "w1", "dimensions": 4},
        {"model": "embedder", "input": "w1", "encoding_format": "int8"},
        {"model": "classifier", "input": "w1"},
        {"model": "plain", "input": "w1"},
    ],
)
def test_bad_embeddings_requests(client: Any, request_: dict[str, Any]) -> None:
    status, found = client.post("/v1/embeddings", request_)
    assert status == 400
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["message"]


def test_question_answering(client: Any, models: dict[str, Path]) -> None:
    # Positions are few here, so that pieces are short: the questions must be, too.
    asked = [("w5", " ".join(f"w{i}" for i in range(40)))]
    status, found = client.post(
        "/v1/question-answering",
        {"model": "answerer", "questions": [{"question": q, "context": c} for q, c in asked]},
    )
    one = pipeline(models, "answerer")
    if one.tokens.max_length <= 67:
        assert status == 400
        assert "leaves no room" in found["error"]
        return
    expected = one.answer([Question("0", q, c, ()) for q, c in asked])
    assert (status, found["answers"]) == (200, expected)


def test_classification(client: Any, models: dict[str, Path]) -> None:
    status, found = client.post("/v1/classification", {"input": TEXTS})
    assert status == 200
    expected = pipeline(models, "classifier").classify(TEXTS)
    for labels, known in zip(found["data"], expected, strict=True):
        assert [label["label"] for label in labels] == [label.label for label in known]
        assert {label["label"] for label in labels} == {"low", "middle", "high"}
        assert sum(label["score"] for label in labels) == pytest.approx(1)


def test_token_classification(client: Any, models: dict[str, Path]) -> None:
    status, found = client.post("/v1/token-classification", {"input": TEXTS[0], "model": "labeller"})
    assert status == 200
    assert [token["text"] for token in found["data"][0]] == ["w1", "w2", "w3"]
    expected = pipeline(models, "labeller").label(TEXTS[:1])[0]
    assert [token["label"] for token in found["data"][0]] == [token.label for token in expected]


def test_the_list_of_models(client: Any) -> None:
    found = client.get("/v1/models")[1]
    assert {model["id"] for model in found["data"]} == {"embedder", "answerer", "classifier", "labeller", "plain"}
