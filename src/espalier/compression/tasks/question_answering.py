"""Extractive question answering on SQuAD v1.1."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from espalier.compression.data import Batch, Feature, Question, Template, Tokens, exact_match, f1, read_squad
from espalier.compression.tasks.base import Columns, EncoderTask, Outputs, cross_entropy
from espalier.compression.tasks.metrics import Scores, mean_of
from espalier.errors import ConfigError, DataError

STRIDE = 128
"""Tokens of context from the start of one piece to the start of the next."""
MAX_QUESTION = 64
MAX_ANSWER = 30
"""Most tokens of an answer."""
_BUDGET = 12288
_OUTSIDE = -1e4
"""Score of padding: its probability is exactly 0 in float32, and differences stay finite."""


@dataclass(frozen=True)
class Piece:
    """A question with a part of its context: ``first`` is the place of the part's first token among the ids,
    ``offsets`` int32 ``[tokens of the part, 2]`` where in the context each token stands.
    """

    question: int
    feature: Feature
    first: int
    offsets: np.ndarray


class QuestionAnswering(EncoderTask):
    """Start and end of the answer in the context. Long contexts are cut into overlapping pieces."""

    name: ClassVar[str] = "question-answering"
    head: ClassVar[str] = "AutoModelForQuestionAnswering"
    default_max_length: ClassVar[int] = 384
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
        self.template = Template.of(tokens.tokenizer)
        room = tokens.max_length - MAX_QUESTION - self.template.overhead
        if room < 1:
            raise ConfigError(
                f"max_length {tokens.max_length} leaves no room for a context beside a question of {MAX_QUESTION} "
                f"tokens; expected at least {MAX_QUESTION + self.template.overhead + 1}, usually 384"
            )
        self._questions: list[Question] = []
        self._pieces: list[Piece] = []

    def _read_training(self, paths: Sequence[Path]) -> list[Feature]:
        found: list[Feature] = []
        for path in paths:
            questions = read_squad(path, guessed=self.guessed)
            # Without a place for its answer a question cannot be learned from.
            usable = [q for q in questions if any(answer.start is not None for answer in q.answers)]
            found.extend(piece.feature for piece in self.pieces(usable))
        return found

    def read_evaluation(self, path: Path) -> None:
        self._questions = read_squad(path)[: self.limit]
        self._pieces = list(self.pieces(self._questions))

    def pieces(self, questions: Sequence[Question]) -> Iterator[Piece]:
        """Every piece of every question. Targets ``start`` and ``end`` are places among the ids, 0 (the first special
        token) where the answer does not lie wholly in the piece. Raises DataError for an empty context.
        """
        tokenizer, frame = self.tokens.tokenizer, self.template
        asked = tokenizer.encode_batch([q.text for q in questions], add_special_tokens=False)
        contexts = list(dict.fromkeys(q.context for q in questions))
        encoded: dict[str, tuple[list[int], np.ndarray]] = {}
        for start in range(0, len(contexts), 2048):
            part = contexts[start : start + 2048]
            for text, e in zip(part, tokenizer.encode_batch(part, add_special_tokens=False), strict=True):
                encoded[text] = (e.ids, np.array(e.offsets, np.int32).reshape(-1, 2))
        for number, (question, e) in enumerate(zip(questions, asked, strict=True)):
            ids, offsets = encoded[question.context]
            if not ids:
                raise DataError(f"question {question.id!r}: its context holds no token")
            first = e.ids[:MAX_QUESTION]
            room = self.tokens.max_length - len(first) - frame.overhead
            begin = len(frame.prefix) + len(first) + len(frame.middle)
            answer = next((a for a in question.answers if a.start is not None), None)
            for start in range(0, len(ids), STRIDE):
                cut = offsets[start : start + room]
                target = {"start": 0, "end": 0}
                if answer is not None and answer.start is not None:
                    target = _place(cut, answer.start, answer.start + len(answer.text), begin)
                joined, types = frame.join(first, ids[start : start + room])
                yield Piece(number, Feature(joined, types, target), begin, cut)
                if start + room >= len(ids):
                    break

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
        best = [(-np.inf, "")] * len(self._questions)
        for rows, out in self.predict(model, [piece.feature for piece in self._pieces], _BUDGET):
            starts, ends = out.logits["start"].numpy(), out.logits["end"].numpy()
            for i, row in enumerate(rows):
                piece = self._pieces[row]
                inside = slice(piece.first, piece.first + len(piece.offsets))
                score, begin, end = _best_span(starts[i, inside], ends[i, inside])
                if score > best[piece.question][0]:
                    context = self._questions[piece.question].context
                    best[piece.question] = score, context[piece.offsets[begin, 0] : piece.offsets[end, 1]]
        return [text for _, text in best]


def _place(offsets: np.ndarray, start: int, end: int, first: int) -> dict[str, int]:
    """The tokens that hold the characters ``start`` to ``end`` of the context."""
    if not offsets[0, 0] <= start or not end <= offsets[-1, 1]:
        return {"start": 0, "end": 0}
    begin = bisect.bisect_right(offsets[:, 1].tolist(), start)
    last = bisect.bisect_left(offsets[:, 1].tolist(), end)
    return {"start": first + begin, "end": first + last}


def _best_span(starts: np.ndarray, ends: np.ndarray) -> tuple[float, int, int]:
    """The largest start + end score with 0 <= end - start < MAX_ANSWER, and the two places."""
    count = len(starts)
    # scores[width, begin]: only spans of allowed widths are formed.
    width = min(MAX_ANSWER, count)
    padded = np.concatenate([ends, np.full(width - 1, -np.inf, ends.dtype)])
    scores = starts[None, :] + np.lib.stride_tricks.sliding_window_view(padded, count)[:width]
    place = int(scores.argmax())
    length, begin = divmod(place, count)
    return float(scores[length, begin]), begin, begin + length
