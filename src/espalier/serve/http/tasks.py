"""Texts in, answers out: OpenAI's embeddings, and the other tasks in the same manner."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.responses import Response

from espalier.data import Feature, Question
from espalier.errors import InputError, InputShapeError
from espalier.pipelines import Embeddings, Prepared, QuestionAnswering, TextClassification, TokenClassification
from espalier.serve import schema
from espalier.serve.http.endpoint import Call
from espalier.serve.models import Model
from espalier.serve.service import Service


class Tasks:
    """The endpoints below ``/v1``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, call: Call) -> Response:
        """The models, as OpenAI lists them."""
        created = int(self._service.started)
        return _json(schema.ModelList([schema.ModelCard(model.name, created) for model in self._service.models]))

    async def embeddings(self, call: Call) -> Response:
        """A vector for each text, as OpenAI's API gives it."""
        request = schema.decode(schema.EmbeddingsRequest, call.body)
        model = self._model(call, request.model, Embeddings)
        pipeline: Embeddings = model.pipeline
        if request.dimensions is not None:
            raise InputError("dimensions cannot be chosen: the model's vectors are as wide as they are; leave it out")
        prepared = await self._prepare_embeddings(pipeline, request.input)
        vectors = await self._run(model, prepared)
        tokens = sum(len(feature.ids) for feature in prepared.features)
        data = [
            schema.Embedding(i, _base64(vector) if request.encoding_format == "base64" else vector.tolist())
            for i, vector in enumerate(vectors)
        ]
        return _json(schema.EmbeddingsResponse(data, model.name, schema.Usage(tokens, tokens)))

    async def answer(self, call: Call) -> Response:
        """The answer to each question, a part of its context."""
        request = schema.decode(schema.AnswerRequest, call.body)
        model = self._model(call, request.model, QuestionAnswering)
        asked = [Question(str(i), q.question, q.context, ()) for i, q in enumerate(request.questions)]
        answers = await self._run(model, await self._service.with_texts(model.pipeline.prepare, asked))
        return _json(schema.AnswerResponse(model.name, answers))

    async def classify(self, call: Call) -> Response:
        """The labels of each text."""
        request = schema.decode(schema.TextsRequest, call.body)
        model = self._model(call, request.model, TextClassification)
        found = await self._run(model, await self._service.with_texts(model.pipeline.prepare, _list(request.input)))
        data = [[schema.LabelScore(label.label, label.score) for label in labels] for labels in found]
        return _json(schema.ClassifyResponse(model.name, data))

    async def tokens(self, call: Call) -> Response:
        """The label of each token of each text."""
        request = schema.decode(schema.TextsRequest, call.body)
        model = self._model(call, request.model, TokenClassification)
        texts = _list(request.input)
        found = await self._run(model, await self._service.with_texts(model.pipeline.prepare, texts))
        data = [
            [schema.TokenLabel(t.start, t.end, text[t.start : t.end], t.label, t.score) for t in tokens]
            for text, tokens in zip(texts, found, strict=True)
        ]
        return _json(schema.TokensResponse(model.name, data))

    def _model(self, call: Call, name: str | None, kind: Any) -> Any:
        model = self._service.models.for_task(name, kind)
        call.model = model.name
        self._service.metrics.decode.observe(time.perf_counter() - call.started)
        return model

    async def _run(self, model: Model, prepared: Prepared[Any]) -> Any:
        if model.pipeline is None:
            raise InputError(f"model {model.name!r} takes tensors only")
        dispatcher = self._service.dispatcher
        arrays = await dispatcher.run_features(model, model.pipeline, prepared.features, self._service.options())
        return prepared.finish(arrays)

    async def _prepare_embeddings(self, pipeline: Embeddings, given: str | list[Any]) -> Prepared[np.ndarray]:
        values = _list(given)
        if all(isinstance(value, str) for value in values):
            if not all(values):
                raise InputShapeError("a text is empty; give every text at least one character")
            prepared: Prepared[np.ndarray] = await self._service.with_texts(pipeline.prepare, values)
            return prepared
        rows = [values] if all(isinstance(value, int) for value in values) else values
        if not all(isinstance(row, list) and row and all(isinstance(token, int) for token in row) for row in rows):
            raise InputError(
                "input must be a text, texts, token ids, or lists of token ids; not a mixture, and not empty"
            )
        return Prepared([_feature(row) for row in rows], np.stack)


def _feature(tokens: Sequence[int]) -> Feature:
    if not all(0 <= token < 1 << 31 for token in tokens):
        raise InputShapeError("a token id lies outside of 0 to 2^31 - 1")
    return Feature(np.array(tokens, np.int32), np.zeros(len(tokens), np.int8), {})


def _list(given: str | list[Any]) -> list[Any]:
    return [given] if isinstance(given, str) else given


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")


def _json(value: object) -> Response:
    return Response(schema.encode(value), media_type="application/json")
