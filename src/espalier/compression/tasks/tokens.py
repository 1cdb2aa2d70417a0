"""Classes of words, such as named entities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from espalier.compression.tasks.base import Columns, EncoderTask, Outputs, cross_entropy
from espalier.compression.tasks.labels import class_names, label_settings
from espalier.data import Batch, Feature, Tokens
from espalier.data.files import read_text
from espalier.data.metrics import Scores
from espalier.errors import DataError

_WORDS = ("tokens", "words")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags")
_CONLL = (".conll", ".bio", ".iob", ".txt")
_NOTHING = "O"

Sentence = tuple[str, list[str], list[str]]
"""Where it stands, its words, and their tags."""


class TokenClassification(EncoderTask):
    """The first token of a word carries its class. Data: lists of words and of tags in JSON lines or datasets on disk,
    or CoNLL files (a word per line, its tag last, a blank line between sentences).
    """

    name: ClassVar[str] = "tokens"
    head: ClassVar[str] = "AutoModelForTokenClassification"
    default_max_length: ClassVar[int] = 256
    scores_tokens: ClassVar[bool] = True

    def __init__(self, tokens: Tokens, *, columns: Columns | None = None, seed: int = 0) -> None:
        super().__init__(tokens, columns=columns, seed=seed)
        self.labels: tuple[str, ...] = ()
        self._evaluation: list[Feature] = []
        self._wanted: list[list[str]] = []

    def _read_training(self, paths: Sequence[Path]) -> list[Feature]:
        sentences = [sentence for path in paths for sentence in self._sentences(path, "train")]
        self.labels = class_names([tag for _, _, tags in sentences for tag in tags], str(paths[0]))
        return [self._feature(*sentence) for sentence in sentences]

    def read_evaluation(self, path: Path) -> None:
        sentences = list(self._sentences(path, "test"))
        self._evaluation = [self._feature(*sentence) for sentence in sentences]
        self._wanted = [tags for _, _, tags in sentences]

    def _sentences(self, path: Path, split: str) -> list[Sentence]:
        if path.is_file() and path.suffix.lower() in _CONLL:
            return _read_conll(path)
        named = (*self.columns.text, *([self.columns.label] if self.columns.label else []))
        table = self.table(path, named, split=split)
        words = self.columns.text[0] if self.columns.text else next((n for n in _WORDS if n in table.columns), "")
        tags = self.columns.label or next((n for n in _TAGS if n in table.columns), "")
        if not words or not tags:
            raise DataError(
                f"{path}: expected a column of lists of words and one of lists of tags, got the columns "
                f"{', '.join(table.columns)}; name them: --text COLUMN --label COLUMN"
            )
        found: list[Sentence] = []
        for row, (given, marks) in enumerate(zip(table.column(words), table.column(tags), strict=True)):
            if not isinstance(given, list) or not isinstance(marks, list) or len(given) != len(marks) or not given:
                raise DataError(
                    f"{table.where(row)}: expected as many tags as words, in two lists; got {str(given)[:40]} and "
                    f"{str(marks)[:40]}"
                )
            found.append((table.where(row), [str(word) for word in given], [str(mark) for mark in marks]))
        return found

    def _feature(self, where: str, words: list[str], tags: list[str]) -> Feature:
        numbers = {name: number for number, name in enumerate(self.labels)}
        ids, types, owners = self.tokens.encode_words(words)
        target = np.full(len(ids), -100, np.int64)
        previous = None
        for place, owner in enumerate(owners):
            if owner is not None and owner != previous:
                tag = tags[owner]
                if tag not in numbers:
                    raise DataError(f"{where}: unknown tag {tag!r}; expected one of {', '.join(self.labels[:20])}")
                target[place] = numbers[tag]
            previous = owner
        return Feature(ids, types, {"labels": target})

    def _head_settings(self, folder: Path) -> dict[str, Any]:
        settings, order = label_settings(folder, self.labels, "TokenClassification")
        if order is not None and order != self.labels:
            renumbered = np.array([order.index(name) for name in self.labels])
            self.labels = order
            for features in (self.training, self._evaluation):
                features[:] = [Feature(f.ids, f.types, {"labels": _renumber(f, renumbered)}) for f in features]
        return settings

    def evaluation_features(self) -> list[Feature]:
        return self._evaluation

    def _logits(self, raw: Any, batch: Batch) -> dict[str, Tensor]:
        return {"logits": raw.logits}

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return cross_entropy(outputs.logits["logits"], batch.targets["labels"])

    def evaluate(self, model: nn.Module) -> Scores | None:
        """F1 over entities for tags like B-X and I-X, over words that are not O otherwise; accuracy is a detail.

        Words beyond ``max_length`` count as O, so that a short limit cannot flatter.
        """
        if not self._evaluation:
            return None
        counts = np.zeros((len(self._evaluation), 3))
        right = total = 0
        entities = any(label[:2] in ("B-", "I-") for label in self.labels)
        for rows, out in self.predict(model, self._evaluation):
            best = out.logits["logits"].argmax(-1).numpy()
            for i, row in enumerate(rows):
                feature, wanted = self._evaluation[row], self._wanted[row]
                places = np.asarray(feature.target["labels"]) != -100
                said = [self.labels[c] for c in best[i, : len(feature.ids)][places]]
                said += [_NOTHING] * (len(wanted) - len(said))
                right += sum(a == b for a, b in zip(said, wanted, strict=True))
                total += len(wanted)
                got, gold = (spans(tags) if entities else words_marked(tags) for tags in (said, wanted))
                counts[row] = len(got & gold), len(got), len(gold)

        def statistic(drawn: np.ndarray) -> float:
            both, got, gold = counts[drawn].sum(0)
            return float(2 * both / (got + gold)) if got + gold else 0.0

        return Scores("F1", len(counts), statistic, {"accuracy": right / max(total, 1)})


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, word after the last, kind) of every entity in IOB tags; a stray I-X begins one, as in conlleval."""
    found: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, _NOTHING]):
        mark, _, name = tag.partition("-")
        if kind and not (mark == "I" and name == kind):
            found.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, name
    return found


def words_marked(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Every word whose tag is not O, as a span of its own."""
    return {(place, place + 1, tag) for place, tag in enumerate(tags) if tag != _NOTHING}


def _renumber(feature: Feature, renumbered: np.ndarray) -> np.ndarray:
    old = np.asarray(feature.target["labels"])
    return np.where(old == -100, -100, renumbered[np.maximum(old, 0)])


def _read_conll(path: Path) -> list[Sentence]:
    found: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*read_text(path).replace("\r\n", "\n").split("\n"), ""], 1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2:
                raise DataError(f"{path}:{number}: expected a word and its tag, got {line.strip()[:40]!r}")
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            found.append((f"{path}:{number - len(words)}", words, tags))
            words, tags = [], []
    if not found:
        raise DataError(f"{path}: there is no sentence; expected lines of a word and its tag")
    return found
