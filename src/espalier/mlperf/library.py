"""Libraries of samples: what a benchmark runs on, and how its answers are scored."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from espalier.data import Feature, Tokens, read_squad, read_table
from espalier.data.metrics import spearman
from espalier.data.question_answering import MAX_LENGTH, Answers, cut_pieces
from espalier.data.squad import evaluate
from espalier.errors import DataError
from espalier.mlperf.features import Samples
from espalier.pipelines import Embeddings, Pipeline, QuestionAnswering

KNOWN = {
    "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9": "SQuAD v1.1 dev",
    "0fc553d286507c579e33376ba9a5118db98f495969db9f37773e520a36557a08": "SQuAD v1.1 dev, rebuilt",
    "11523b625219e94e9ca05d2816b5f02cac1614c5894fe657376fa0806378d053": "STS-B test",
}
"""Data files by SHA-256."""


@dataclass(frozen=True)
class Accuracy:
    """``value`` is the benchmark's metric in per cent; ``details`` others. ``line`` is MLPerf's form of both."""

    metric: str
    value: float
    details: dict[str, float]
    line: str


class Library(ABC):
    """A data set, tokenised. Sample ``i`` is ``samples[i]``; answers are scored by their numbers."""

    pipeline: ClassVar[type[Pipeline]]
    max_length: ClassVar[int]

    def __init__(self, path: Path, features: Sequence[Feature]) -> None:
        self.path = path
        self.digest = sha256(path)
        self.samples = Samples.of(features)

    @property
    def title(self) -> str:
        """What the data file is, by its checksum."""
        return KNOWN.get(self.digest, f"{self.path.name}, not one of the files known here")

    @staticmethod
    @abstractmethod
    def find(folder: Path) -> Path:
        """The data file in a folder. Raises DataError."""

    @classmethod
    @abstractmethod
    def read(cls, path: Path, tokens: Tokens) -> Library:
        """Read and tokenise a file. Raises DataError."""

    @abstractmethod
    def score(self, answers: Mapping[int, np.ndarray]) -> Accuracy:
        """Score ``answers`` by sample; samples without one count as wrong."""


class SquadLibrary(Library):
    """SQuAD v1.1, cut as MLPerf does: pieces of 384 tokens with a stride of 128, questions of 64 at most."""

    pipeline: ClassVar[type[Pipeline]] = QuestionAnswering
    max_length: ClassVar[int] = MAX_LENGTH

    def __init__(self, path: Path, tokens: Tokens) -> None:
        self.questions = read_squad(path)
        self.pieces = list(cut_pieces(tokens, self.questions))
        super().__init__(path, [piece.feature for piece in self.pieces])

    @staticmethod
    def find(folder: Path) -> Path:
        return _only(folder, ("dev-v1.1.json", "dev-v1.1*.json"), "SQuAD's dev-v1.1.json")

    @classmethod
    def read(cls, path: Path, tokens: Tokens) -> SquadLibrary:
        return cls(path, tokens)

    def predictions(self, answers: Mapping[int, np.ndarray]) -> dict[str, str]:
        """Answers as texts by question id. An answer is float32 ``[tokens, 2]``; one of another shape is dropped."""
        best = Answers(self.questions)
        for number, scores in answers.items():
            piece = self.pieces[number]
            if scores.size == 2 * len(piece.feature.ids):
                starts, ends = scores.reshape(-1, 2).T
                best.add(piece, starts, ends)
        return {question.id: text for question, text in zip(self.questions, best.texts, strict=True)}

    def score(self, answers: Mapping[int, np.ndarray]) -> Accuracy:
        exact, f1 = evaluate(self.questions, self.predictions(answers))
        return Accuracy("F1", f1, {"exact_match": exact}, f'{{"exact_match": {exact}, "f1": {f1}}}')


class PairsLibrary(Library):
    """Pairs of sentences with a score, as STS-B has them. Every sentence is a sample: all left ones, then all right."""

    pipeline: ClassVar[type[Pipeline]] = Embeddings
    max_length: ClassVar[int] = 128

    def __init__(self, path: Path, tokens: Tokens) -> None:
        table = read_table(path)
        if len(table.columns) < 3:
            raise DataError(f"{path}: expected two texts and a score in each row, got {len(table.columns)} columns")
        first, second, score = table.columns[:3]
        self.gold = np.array(table.numbers(score))
        encoded = tokens.encode(table.texts(first) + table.texts(second))
        super().__init__(path, [Feature(ids, types, {}) for ids, types in encoded])

    @staticmethod
    def find(folder: Path) -> Path:
        return _only(
            folder, ("stsb-en-test.csv", "*test*.csv", "*test*.tsv"), "a table of pairs, such as STS-B's test set"
        )

    @classmethod
    def read(cls, path: Path, tokens: Tokens) -> PairsLibrary:
        return cls(path, tokens)

    def score(self, answers: Mapping[int, np.ndarray]) -> Accuracy:
        half = len(self.gold)
        zero = np.zeros(1, np.float32)
        pairs = [(answers.get(i, zero), answers.get(half + i, zero)) for i in range(half)]
        cosine = np.array([float(a @ b) if a.shape == b.shape else 0.0 for a, b in pairs])
        value = 100 * spearman(cosine, self.gold)
        return Accuracy("Spearman", value, {}, f'{{"spearman": {value}}}')


LIBRARIES: dict[str, type[Library]] = {"squad": SquadLibrary, "pairs": PairsLibrary}


def read_library(name: str, data: Path, tokenizer: Path) -> Library:
    """The library ``name`` of a data file, or of the file it finds in a folder.

    A checksum that a ``SHA256SUMS`` beside it or one folder up lists is compared. Raises DataError when the data is
    missing or damaged, and what reading the tokenizer raises.
    """
    kind = LIBRARIES[name]
    if not data.exists():
        raise DataError(f"{data}: no such file or folder; give the data set, or the folder it lies in, with --data")
    path = kind.find(data) if data.is_dir() else data
    _check_sum(path)
    return kind.read(path, Tokens.read(tokenizer, kind.max_length))


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _only(folder: Path, patterns: Sequence[str], what: str) -> Path:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{folder}: several files could be {what}: {names}; give one of them")
        if found:
            return found[0]
    raise DataError(f"{folder}: expected {what} in it; give the file itself if it has another name")


def _check_sum(path: Path) -> None:
    for folder in (path.parent, path.parent.parent):
        sums = folder / "SHA256SUMS"
        if not sums.is_file():
            continue
        lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
        expected = {name: digest for digest, name in lines}.get(str(path.relative_to(folder)))
        if expected is not None and expected != (found := sha256(path)):
            raise DataError(f"{path} is damaged: {sums} lists the SHA-256 {expected}, it has {found}; fetch it again")
