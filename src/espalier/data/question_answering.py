"""From questions to the pieces a model reads, and from its scores back to answers (Devlin et al. 2019, SQuAD v1.1)."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from espalier.data.batching import Feature
from espalier.data.squad import Question
from espalier.data.tokens import Template, Tokens
from espalier.errors import ConfigError, DataError

STRIDE = 128
"""Tokens of context from the start of one piece to the start of the next."""
MAX_QUESTION = 64
MAX_ANSWER = 30
"""Most tokens of an answer."""
MAX_LENGTH = 384
"""Tokens of a piece at most, by default."""


@dataclass(frozen=True)
class Piece:
    """A question with a part of its context: ``first`` is the place of the part's first token among the ids,
    ``offsets`` int32 ``[tokens of the part, 2]`` where in the context each token stands. ``owned`` bool
    ``[tokens of the part]``: whether no other piece shows more of the context around a token; answers begin at such
    tokens only.
    """

    question: int
    feature: Feature
    first: int
    offsets: np.ndarray
    owned: np.ndarray


def check_room(tokens: Tokens) -> Template:
    """The tokenizer's frame. Raises ConfigError when it does not leave a context one token beside a long question."""
    frame = Template.of(tokens.tokenizer)
    if tokens.max_length - MAX_QUESTION - frame.overhead < 1:
        raise ConfigError(
            f"max_length {tokens.max_length} leaves no room for a context beside a question of {MAX_QUESTION} "
            f"tokens; expected at least {MAX_QUESTION + frame.overhead + 1}, usually {MAX_LENGTH}"
        )
    return frame


def cut_pieces(tokens: Tokens, questions: Sequence[Question]) -> Iterator[Piece]:
    """Every piece of every question, in order; long contexts are cut into overlapping pieces.

    Targets ``start`` and ``end`` are places among the ids, 0 (the first special token) where the answer does not lie
    wholly in the piece. Raises DataError for an empty context, ConfigError as :func:`check_room`.
    """
    tokenizer, frame = tokens.tokenizer, check_room(tokens)
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
        room = tokens.max_length - len(first) - frame.overhead
        begin = len(frame.prefix) + len(first) + len(frame.middle)
        answer = next((a for a in question.answers if a.start is not None), None)
        starts = range(0, max(1, len(ids) - room + STRIDE), STRIDE)
        owners = _owners(len(ids), starts, room)
        for index, start in enumerate(starts):
            cut = offsets[start : start + room]
            target = {"start": 0, "end": 0}
            if answer is not None and answer.start is not None:
                target = _place(cut, answer.start, answer.start + len(answer.text), begin)
            joined, types = frame.join(first, ids[start : start + room])
            yield Piece(number, Feature(joined, types, target), begin, cut, owners[start : start + room] == index)


def _owners(count: int, starts: range, room: int) -> np.ndarray:
    """For each of ``count`` tokens, the piece in which the smaller of its two contexts is largest, ties to the first.

    The length of a piece counts for a hundredth, as in BERT's own evaluation.
    """
    if len(starts) == 1:
        return np.zeros(count, np.int64)
    places = np.arange(count)
    begins = np.array(starts)[:, None]
    lengths = np.minimum(room, count - begins)
    context = np.minimum(places - begins, begins + lengths - 1 - places)
    owners: np.ndarray = np.where(context < 0, -1.0, context + 0.01 * lengths).argmax(axis=0)
    return owners


def _place(offsets: np.ndarray, start: int, end: int, first: int) -> dict[str, int]:
    """The tokens that hold the characters ``start`` to ``end`` of the context."""
    if not offsets[0, 0] <= start or not end <= offsets[-1, 1]:
        return {"start": 0, "end": 0}
    begin = bisect.bisect_right(offsets[:, 1].tolist(), start)
    last = bisect.bisect_left(offsets[:, 1].tolist(), end)
    return {"start": first + begin, "end": first + last}


class Answers:
    """Collects the best-scoring span of each question over its pieces, which may come in any order."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._best = [(-np.inf, "")] * len(questions)

    def add(self, piece: Piece, starts: np.ndarray, ends: np.ndarray) -> None:
        """Take in a model's scores for one piece: ``starts`` and ``ends`` are float ``[tokens of the whole piece]``."""
        inside = slice(piece.first, piece.first + len(piece.offsets))
        score, begin, end = best_span(np.where(piece.owned, starts[inside], -np.inf), ends[inside])
        if score > self._best[piece.question][0]:
            context = self._questions[piece.question].context
            self._best[piece.question] = score, context[piece.offsets[begin, 0] : piece.offsets[end, 1]]

    @property
    def texts(self) -> list[str]:
        """The answers found, one per question; "" for a question none of whose pieces were added."""
        return [text for _, text in self._best]


def best_span(starts: np.ndarray, ends: np.ndarray) -> tuple[float, int, int]:
    """The largest start + end score with 0 <= end - start < MAX_ANSWER, and the two places."""
    count = len(starts)
    # scores[width, begin]: only spans of allowed widths are formed.
    width = min(MAX_ANSWER, count)
    padded = np.concatenate([ends, np.full(width - 1, -np.inf, ends.dtype)])
    scores = starts[None, :] + np.lib.stride_tricks.sliding_window_view(padded, count)[:width]
    place = int(scores.argmax())
    length, begin = divmod(place, count)
    return float(scores[length, begin]), begin, begin + length
