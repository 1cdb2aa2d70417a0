"""Sentence embeddings: learned from a dense teacher on unlabelled text, judged by pairs of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compression.tasks.base import Columns, EncoderTask, Outputs, Wants
from espalier.compression.tasks.models import pooling_of
from espalier.data import Batch, Feature, Table, Tokens, read_squad, read_texts
from espalier.data.hub import is_dataset
from espalier.data.metrics import Scores, spearman
from espalier.data.squad import is_squad
from espalier.data.tabular import SUFFIXES
from espalier.errors import ConfigError, DataError

_PAIRS = (("sentence1", "sentence2"), ("text1", "text2"), ("sentence_a", "sentence_b"))
_SCORES = ("score", "similarity_score", "similarity", "label")


class Embeddings(EncoderTask):
    """Mean or CLS pooling, as the folder says. Data: text files, tables with texts, SQuAD files, datasets on disk."""

    name: ClassVar[str] = "embeddings"
    head: ClassVar[str] = "AutoModel"
    default_max_length: ClassVar[int] = 128

    def __init__(self, tokens: Tokens, *, columns: Columns | None = None, seed: int = 0) -> None:
        super().__init__(tokens, columns=columns, seed=seed)
        self.pooling = ""
        self._pairs: list[Feature] = []
        self._gold = np.zeros(0)

    def load(self, folder: Path, *, attention: bool = False) -> nn.Module:
        found = pooling_of(folder)
        if self.pooling and found != self.pooling:
            raise ConfigError(
                f"{folder} pools by {found}, the model by {self.pooling}; a teacher must pool the same way"
            )
        self.pooling = found
        return super().load(folder, attention=attention)

    def _read_training(self, paths: Sequence[Path]) -> list[Feature]:
        texts: dict[str, None] = {}
        for path in paths:
            texts.update(dict.fromkeys(self._texts(path)))
        return [Feature(ids, types, {}) for ids, types in self.tokens.encode(list(texts))]

    def _texts(self, path: Path) -> list[str]:
        if is_squad(path):
            questions = read_squad(path)
            return list(dict.fromkeys([q.context for q in questions] + [q.text for q in questions]))
        if path.suffix.lower() not in SUFFIXES and not (path.is_dir() and is_dataset(path)):
            return read_texts(path)
        table = self.table(path, self.columns.text)
        names = self.columns.text or _text_columns(table)
        return [text for name in names for text in table.texts(name)]

    def read_evaluation(self, path: Path) -> None:
        """Read pairs: two texts and a score, under the columns' names, or by kind in a file without a header."""
        wanted = (*self.columns.text, self.columns.label) if len(self.columns.text) == 2 and self.columns.label else ()
        table = self.table(path, wanted, split="test")
        first, second, score = wanted or _pair_columns(table)
        self._gold = np.array(table.numbers(score))
        if len(set(self._gold.tolist())) < 2:
            raise DataError(f"{path}: all scores are {self._gold[0]:g}; a rank correlation needs different ones")
        encoded = self.tokens.encode(table.texts(first) + table.texts(second))
        self._pairs = [Feature(ids, types, {}) for ids, types in encoded]

    def evaluation_features(self) -> list[Feature]:
        return self._pairs

    def _embedding(self, raw: Any, batch: Batch) -> Tensor:
        hidden: Tensor = raw.last_hidden_state.float()
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = batch.mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        raise ConfigError(
            "the task 'embeddings' has no labels, so recovery.task must be 0: it learns from the dense model's hidden "
            "states and embeddings"
        )

    def pruning_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The embeddings times noise.

        The distance to the teacher has no gradient while both are the same network. Its Gauss-Newton matrix is
        ``J^T J``, and ``J^T r`` with standard normal ``r`` is a sample with that covariance: the Fisher information of
        an embedding observed under unit noise. The noise depends on the batch and the seed alone.
        """
        embedding = self.outputs(model, batch, Wants()).embedding
        if embedding is None:
            raise ConfigError("the model returned no embedding")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(batch.rows[0]))
        noise = torch.randn(embedding.shape, generator=generator).to(embedding.device)
        return (nn.functional.normalize(embedding, dim=-1) * noise).sum() / len(embedding)

    def embed(self, model: nn.Module, features: Sequence[Feature]) -> np.ndarray:
        """float32 ``[features, width]``, of length one."""
        found: np.ndarray | None = None
        for rows, out in self.predict(model, features):
            if out.embedding is None:
                raise ConfigError("the model returned no embedding")
            vectors = nn.functional.normalize(out.embedding, dim=-1).numpy()
            if found is None:
                found = np.zeros((len(features), vectors.shape[1]), np.float32)
            found[rows] = vectors
        if found is None:
            raise DataError("there is no text to embed")
        return found

    def evaluate(self, model: nn.Module) -> Scores | None:
        """Spearman's correlation of the cosine with the score of each pair."""
        if not self._pairs:
            return None
        vectors = self.embed(model, self._pairs)
        half = len(self._gold)
        cosine, gold = (vectors[:half] * vectors[half:]).sum(1), self._gold
        return Scores("spearman", half, lambda drawn: spearman(cosine[drawn], gold[drawn]))


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _text_columns(table: Table) -> list[str]:
    """The columns that hold texts: strings, and not numbers."""
    first = table.rows[0]
    found = [n for n, v in zip(table.columns, first, strict=True) if isinstance(v, str) and not _is_number(v)]
    if not found:
        raise DataError(f"{table.path}: no column of texts; it has {', '.join(table.columns)}")
    return found


def _pair_columns(table: Table) -> tuple[str, str, str]:
    score = [name for name in _SCORES if name in table.columns]
    for first, second in _PAIRS:
        if first in table.columns and second in table.columns and score:
            return first, second, score[0]
    if all(name.isdecimal() for name in table.columns):
        row = table.rows[0]
        numbers = [n for n, v in zip(table.columns, row, strict=True) if _is_number(v)]
        texts = [n for n in table.columns if n not in numbers]
        if len(texts) == 2 and len(numbers) == 1:
            return texts[0], texts[1], numbers[0]
    raise DataError(
        f"{table.path}: expected two texts and a score, got the columns {', '.join(table.columns)}; name them: "
        "--text FIRST --text SECOND --label SCORE"
    )
