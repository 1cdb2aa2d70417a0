"""Classes of texts or of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from espalier.compression.tasks.base import Columns, EncoderTask, Outputs, cross_entropy
from espalier.compression.tasks.labels import class_names, label_settings
from espalier.data import Batch, Feature, Table, Tokens
from espalier.data.metrics import Scores, mean_of
from espalier.errors import DataError

_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("text",), ("sentence",))
_LABELS = ("label", "labels", "class")


class Classification(EncoderTask):
    """One class per text or pair. The classes are the model's where it names them, else those of the training data."""

    name: ClassVar[str] = "classification"
    head: ClassVar[str] = "AutoModelForSequenceClassification"
    default_max_length: ClassVar[int] = 128

    def __init__(self, tokens: Tokens, *, columns: Columns | None = None, seed: int = 0) -> None:
        super().__init__(tokens, columns=columns, seed=seed)
        self.labels: tuple[str, ...] = ()
        self._evaluation: list[Feature] = []

    def _read_training(self, paths: Sequence[Path]) -> list[Feature]:
        tables = [self.table(path, self._named()) for path in paths]
        given = [value for table in tables for value in _labels(table, self._choose(table)[1])]
        self.labels = class_names(given, str(paths[0]))
        return [feature for table in tables for feature in self._features(table)]

    def read_evaluation(self, path: Path) -> None:
        self._evaluation = self._features(self.table(path, self._named(), split="test"))

    def _named(self) -> tuple[str, ...]:
        return (*self.columns.text, *([self.columns.label] if self.columns.label else []))

    def _choose(self, table: Table) -> tuple[tuple[str, ...], str]:
        label = self.columns.label or next((name for name in _LABELS if name in table.columns), "")
        texts = self.columns.text or next((names for names in _TEXTS if set(names) <= set(table.columns)), ())
        if not label or not 1 <= len(texts) <= 2:
            raise DataError(
                f"{table.path}: expected one or two texts and a label, got the columns {', '.join(table.columns)}; "
                "name them: --text COLUMN --label COLUMN"
            )
        return texts, label

    def _features(self, table: Table) -> list[Feature]:
        texts, label = self._choose(table)
        numbers = {name: number for number, name in enumerate(self.labels)}
        targets: list[int] = []
        for row, value in enumerate(_labels(table, label)):
            if value not in numbers:
                raise DataError(
                    f"{table.where(row)}: unknown label {value!r}; expected one of {', '.join(self.labels[:20])}"
                )
            targets.append(numbers[value])
        encoded = self.tokens.encode(*(table.texts(name) for name in texts))
        return [Feature(ids, types, {"label": target}) for (ids, types), target in zip(encoded, targets, strict=True)]

    def _head_settings(self, folder: Path) -> dict[str, Any]:
        settings, order = label_settings(folder, self.labels, "SequenceClassification")
        if order is not None:
            self._reorder(order)
        return settings

    def _reorder(self, order: tuple[str, ...]) -> None:
        """Number the labels as the model does."""
        if order == self.labels:
            return
        renumbered = {old: order.index(name) for old, name in enumerate(self.labels)}
        self.labels = order
        for features in (self.training, self._evaluation):
            features[:] = [Feature(f.ids, f.types, {"label": renumbered[int(f.target["label"])]}) for f in features]

    def evaluation_features(self) -> list[Feature]:
        return self._evaluation

    def _logits(self, raw: Any, batch: Batch) -> dict[str, Tensor]:
        return {"logits": raw.logits}

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return cross_entropy(outputs.logits["logits"], batch.targets["label"])

    def evaluate(self, model: nn.Module) -> Scores | None:
        """Accuracy; the macro-averaged F1 is among the details."""
        if not self._evaluation:
            return None
        predicted = np.zeros(len(self._evaluation), np.int64)
        for rows, out in self.predict(model, self._evaluation):
            predicted[rows] = out.logits["logits"].argmax(-1).numpy()
        wanted = np.array([int(feature.target["label"]) for feature in self._evaluation])
        per_class = [_f1(predicted == c, wanted == c) for c in range(len(self.labels)) if (wanted == c).any()]
        right = (predicted == wanted).astype(np.float64)
        return Scores("accuracy", len(right), mean_of(right), {"macro F1": float(np.mean(per_class))})


def _labels(table: Table, column: str) -> list[str]:
    values = table.column(column)
    for row, value in enumerate(values):
        if value is None or isinstance(value, float | list | dict) or not str(value).strip():
            raise DataError(
                f"{table.where(row)}: column {column!r} must hold a class, a text or a whole number; got {value!r}"
            )
    return [str(value).strip() for value in values]


def _f1(predicted: np.ndarray, wanted: np.ndarray) -> float:
    both = int((predicted & wanted).sum())
    total = int(predicted.sum() + wanted.sum())
    return 2 * both / total if total else 0.0
