"""SQuAD v1.1: the file, and the official evaluator's exact match and F1 (Rajpurkar et al. 2016, evaluate-v1.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.data.files import read_json
from espalier.errors import DataError

_PUNCTUATION = set(string.punctuation)


@dataclass(frozen=True)
class Answer:
    """A reference answer; ``start`` counts characters of the context, None where the place is only a guess."""

    text: str
    start: int | None


@dataclass(frozen=True)
class Question:
    """One question about ``context``. All questions about a paragraph share the same ``context`` object."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...]


def read_squad(path: Path, *, guessed: Path | None = None) -> list[Question]:
    """Read a SQuAD v1.1 file.

    ``guessed`` is a JSON list of ``[question id, answer index]`` whose ``answer_start`` is a guess; those answers are
    kept for evaluation, with ``start=None``. Raises DataError when a file is not of that form, or an answer is not
    where it says.
    """
    content = read_json(path)
    skipped = _read_guessed(guessed) if guessed is not None else set()
    questions: list[Question] = []
    seen: set[str] = set()
    for where, paragraph in _paragraphs(path, content):
        context = _field(paragraph, "context", str, where)
        for number, entry in enumerate(_field(paragraph, "qas", list, where)):
            place = f"{where}.qas[{number}]"
            key, text = _field(entry, "id", str, place), _field(entry, "question", str, place)
            if key in seen:
                raise DataError(f"{place}: the id {key!r} occurs twice; ids must tell the questions apart")
            seen.add(key)
            answers = []
            for index, answer in enumerate(_field(entry, "answers", list, place)):
                spot = f"{place}.answers[{index}]"
                words, start = _field(answer, "text", str, spot), _field(answer, "answer_start", int, spot)
                if (key, index) in skipped:
                    answers.append(Answer(words, None))
                    continue
                if context[start : start + len(words)] != words:
                    raise DataError(
                        f"{spot}: expected {words[:40]!r} at character {start} of the context, "
                        f"got {context[start : start + len(words)][:40]!r}"
                    )
                answers.append(Answer(words, start))
            if not answers:
                raise DataError(
                    f"{place}: question {key!r} has no answer; SQuAD v1.1 has one or more for every question"
                )
            questions.append(Question(key, text, context, tuple(answers)))
    if not questions:
        raise DataError(f"{path}: there is no question in this file; expected at least one")
    if guessed is not None and not skipped & {(q.id, i) for q in questions for i in range(len(q.answers))}:
        raise DataError(f"{guessed}: none of its entries names an answer of {path}; is it the list of another file?")
    return questions


def is_squad(path: Path) -> bool:
    """Whether a .json file looks like SQuAD, judged by its first bytes."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return b'"data"' in head or b'"version"' in head


def _paragraphs(path: Path, content: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    for article_number, article in enumerate(_field(content, "data", list, str(path))):
        place = f"{path}: data[{article_number}]"
        for number, paragraph in enumerate(_field(article, "paragraphs", list, place)):
            yield f"{place}.paragraphs[{number}]", paragraph


def _field(value: Any, name: str, kind: type, where: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise DataError(
            f"{where}: expected a SQuAD v1.1 file, in which {name!r} is a {kind.__name__}; got {str(found)[:40]!r}"
        )
    return found


def _read_guessed(path: Path) -> set[tuple[str, int]]:
    entries = read_json(path)
    good = isinstance(entries, list) and all(
        isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) and isinstance(e[1], int) for e in entries
    )
    if not good:
        raise DataError(f"{path}: expected a JSON list of [question id, answer index], got {str(entries)[:60]}")
    return {(key, index) for key, index in entries}


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: as the official evaluator compares answers."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, truths: Iterable[str]) -> float:
    """1.0 when the prediction equals a reference answer after :func:`normalise`, else 0.0."""
    given = normalise(prediction)
    return float(any(given == normalise(truth) for truth in truths))


def f1(prediction: str, truths: Iterable[str]) -> float:
    """The largest F1 over words, 0 to 1, of the prediction against any reference answer."""
    given = normalise(prediction).split()
    best = 0.0
    for truth in truths:
        wanted = normalise(truth).split()
        common = sum((Counter(given) & Counter(wanted)).values())
        if common:
            # In the official evaluator's order of operations, so that its last digit is ours too.
            precision, recall = common / len(given), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def evaluate(questions: Sequence[Question], predictions: Mapping[str, str]) -> tuple[float, float]:
    """Exact match and F1 in per cent, equal to the official evaluator's to the last digit.

    ``predictions`` maps ids to answers; a question without one scores 0. Raises DataError when there is no question.
    """
    if not questions:
        raise DataError("there is no question to evaluate; expected at least one")
    exact = total = 0.0
    for question in questions:
        truths = [answer.text for answer in question.answers]
        if question.id in predictions:
            exact += exact_match(predictions[question.id], truths)
            total += f1(predictions[question.id], truths)
    return 100.0 * exact / len(questions), 100.0 * total / len(questions)
