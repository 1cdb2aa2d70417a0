"""Extractive question answering: where in a text the answer to a question stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from espalier.data import Question
from espalier.data.question_answering import MAX_LENGTH, Answers, cut_pieces
from espalier.pipelines.base import Pipeline, Prepared, unsuitable


class QuestionAnswering(Pipeline):
    """``run`` gives float32 ``[tokens, 2]`` per feature: the scores of a start and of an end at each token."""

    default_max_length: ClassVar[int] = MAX_LENGTH

    @staticmethod
    def choose(outputs: Mapping[str, int]) -> list[str]:
        for names in (["start_logits", "end_logits"], ["output_start_logits", "output_end_logits"], ["logits"]):
            if set(names) <= set(outputs):
                return names
        raise unsuitable("question answering", "the outputs start_logits and end_logits (or logits)", outputs)

    @staticmethod
    def result(outputs: Sequence[np.ndarray]) -> np.ndarray:
        if len(outputs) == 1:
            return np.ascontiguousarray(outputs[0], np.float32)
        scores = np.empty((len(outputs[0]), 2), np.float32)
        scores[:, 0], scores[:, 1] = outputs
        return scores

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """The best-scoring span of each question's context. Raises DataError for an empty context."""
        prepared = self.prepare(questions)
        return prepared.finish(self.run(prepared.features))

    def prepare(self, questions: Sequence[Question]) -> Prepared[list[str]]:
        """:meth:`answer` in two parts."""
        pieces = list(cut_pieces(self.tokens, questions))

        def finish(results: Sequence[np.ndarray]) -> list[str]:
            answers = Answers(questions)
            for piece, scores in zip(pieces, results, strict=True):
                answers.add(piece, scores[:, 0], scores[:, 1])
            return answers.texts

        return Prepared([piece.feature for piece in pieces], finish)
