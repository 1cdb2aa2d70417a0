"""Extractive question answering on SQuAD v1.1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from espalier.compression.tasks.base import Columns, EncoderTask, Outputs, cross_entropy
from espalier.data import Batch, Feature, Question, Tokens, exact_match, f1, read_squad
from espalier.data.metrics import Scores, mean_of
from espalier.data.question_answering import MAX_LENGTH, Answers, Piece, check_room, cut_pieces

_OUTSIDE = -1e4
"""Score of padding: its probability is exactly 0 in float32, and differences stay finite."""


class QuestionAnswering(EncoderTask):
    """Start and end of the answer in the context."""

    name: ClassVar[str] = "question-answering"
    head: ClassVar[str] = "AutoModelForQuestionAnswering"
    default_max_length: ClassVar[int] = MAX_LENGTH
    scores_tokens: ClassVar[bool] = True

    def __init__(
        self,
        tokens: Tokens,
        *,
        columns: Columns | None = None,
        seed: int = 0,
        guessed: Path | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(tokens, columns=columns, seed=seed)
        self.guessed = guessed
        self.limit = limit
        check_room(tokens)
        self._questions: list[Question] = []
        self._pieces: list[Piece] = []

    def _read_training(self, paths: Sequence[Path]) -> list[Feature]:
        found: list[Feature] = []
        for path in paths:
            questions = read_squad(path, guessed=self.guessed)
            # Without a place for its answer a question cannot be learned from.
            usable = [q for q in questions if any(answer.start is not None for answer in q.answers)]
            found.extend(piece.feature for piece in cut_pieces(self.tokens, usable))
        return found

    def read_evaluation(self, path: Path) -> None:
        self._questions = read_squad(path)[: self.limit]
        self._pieces = list(cut_pieces(self.tokens, self._questions))

    def evaluation_features(self) -> list[Feature]:
        return [piece.feature for piece in self._pieces]

    def _logits(self, raw: Any, batch: Batch) -> dict[str, Tensor]:
        outside = batch.mask == 0
        return {
            "start": raw.start_logits.float().masked_fill(outside, _OUTSIDE),
            "end": raw.end_logits.float().masked_fill(outside, _OUTSIDE),
        }

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        losses = [cross_entropy(outputs.logits[end], batch.targets[end]) for end in ("start", "end")]
        return (losses[0] + losses[1]) / 2

    def evaluate(self, model: nn.Module) -> Scores | None:
        """F1 by the official evaluator's definition, 0 to 1; the exact match is a detail."""
        if not self._questions:
            return None
        said = self.answer(model)
        truths = [[answer.text for answer in q.answers] for q in self._questions]
        scores = np.array([f1(text, wanted) for text, wanted in zip(said, truths, strict=True)])
        exact = float(np.mean([exact_match(text, wanted) for text, wanted in zip(said, truths, strict=True)]))
        return Scores("F1", len(scores), mean_of(scores), {"exact match": exact})

    def answer(self, model: nn.Module) -> list[str]:
        """The best-scoring span of each evaluation question over its pieces."""
        answers = Answers(self._questions)
        for rows, out in self.predict(model, [piece.feature for piece in self._pieces]):
            starts, ends = out.logits["start"].numpy(), out.logits["end"].numpy()
            for i, row in enumerate(rows):
                answers.add(self._pieces[row], starts[i], ends[i])
        return answers.texts
