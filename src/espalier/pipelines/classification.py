"""Classification of whole texts, and of each of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from espalier.data import Feature, Tokens
from espalier.pipelines.base import Pipeline, Prepared, unsuitable
from espalier.session import Session


@dataclass(frozen=True)
class Label:
    """``score``: the softmax of the model's scores, between 0 and 1."""

    label: str
    score: float


@dataclass(frozen=True)
class LabelledToken:
    """A token: the characters ``start`` to ``end`` of its text, and its best label."""

    start: int
    end: int
    label: str
    score: float


class _Labelling(Pipeline):
    """``labels``: what the model's scores stand for, in order; LABEL_0 and so on where there is no name."""

    default_max_length: ClassVar[int] = 512

    def __init__(self, session: Session, tokens: Tokens | None, labels: Sequence[str] = ()) -> None:
        super().__init__(session, tokens)
        self.labels = tuple(labels)

    @staticmethod
    def result(outputs: Sequence[np.ndarray]) -> np.ndarray:
        scores = np.asarray(outputs[0], np.float32)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)

    def _label(self, number: int) -> str:
        return self.labels[number] if number < len(self.labels) else f"LABEL_{number}"


class TextClassification(_Labelling):
    """``run`` gives float32 ``[labels]`` per feature, probabilities."""

    @staticmethod
    def choose(outputs: Mapping[str, int]) -> list[str]:
        if outputs.get("logits") == 2:
            return ["logits"]
        raise unsuitable("text classification", "an output logits [batch, labels]", outputs)

    def classify(self, texts: Sequence[str]) -> list[list[Label]]:
        """Every label of every text, the likeliest first."""
        prepared = self.prepare(texts)
        return prepared.finish(self.run(prepared.features))

    def prepare(self, texts: Sequence[str]) -> Prepared[list[list[Label]]]:
        """:meth:`classify` in two parts."""
        features = [Feature(ids, types, {}) for ids, types in self.tokens.encode(texts)]
        return Prepared(features, lambda results: [self._ranked(scores) for scores in results])

    def _ranked(self, scores: np.ndarray) -> list[Label]:
        return [Label(self._label(int(i)), float(scores[i])) for i in np.argsort(-scores, kind="stable")]


class TokenClassification(_Labelling):
    """``run`` gives float32 ``[tokens, labels]`` per feature, probabilities."""

    @staticmethod
    def choose(outputs: Mapping[str, int]) -> list[str]:
        if outputs.get("logits") == 3:
            return ["logits"]
        raise unsuitable("token classification", "an output logits [batch, tokens, labels]", outputs)

    def label(self, texts: Sequence[str]) -> list[list[LabelledToken]]:
        """The tokens of every text with their labels, without the special ones."""
        prepared = self.prepare(texts)
        return prepared.finish(self.run(prepared.features))

    def prepare(self, texts: Sequence[str]) -> Prepared[list[list[LabelledToken]]]:
        """:meth:`label` in two parts."""
        encoded = self.tokens.encode_with_offsets(texts)
        features = [Feature(ids, types, {}) for ids, types, _ in encoded]

        def finish(results: Sequence[np.ndarray]) -> list[list[LabelledToken]]:
            return [self._labelled(spans, scores) for (_, _, spans), scores in zip(encoded, results, strict=True)]

        return Prepared(features, finish)

    def _labelled(self, spans: np.ndarray, scores: np.ndarray) -> list[LabelledToken]:
        best = scores.argmax(axis=-1)
        return [
            LabelledToken(int(start), int(end), self._label(int(best[i])), float(scores[i, best[i]]))
            for i, (start, end) in enumerate(spans)
            if end > start  # special tokens stand for no character
        ]
