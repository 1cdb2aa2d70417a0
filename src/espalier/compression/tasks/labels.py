"""Names and numbers of classes: those of the model where it has them, else those of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espalier.compression.tasks.models import model_home
from espalier.errors import DataError, ModelFormatError

_MOST_CLASSES = 1000


def class_names(values: Sequence[str], where: str) -> tuple[str, ...]:
    """The distinct labels, numbers by value and texts by alphabet.

    Raises DataError when there is one class only, or so many that the column is hardly one of classes.
    """
    names = set(values)
    if len(names) < 2:
        raise DataError(f"{where}: every example has the label {min(names)!r}; expected at least two classes")
    if len(names) > _MOST_CLASSES or (len(values) > 50 and len(names) > len(values) / 2):
        raise DataError(
            f"{where}: {len(names)} different labels in {len(values)} examples; expected classes, so is this the "
            "column of labels?"
        )
    numeric = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))


def label_settings(folder: Path, labels: Sequence[str], head: str) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Settings for ``from_pretrained``, and the order of the model's own classes (None: number them as ``labels``).

    A folder whose architecture has this ``head`` keeps its classes, which must cover those of the data: by name, or as
    the numbers 0 to n - 1. Raises DataError when they do not.
    """
    path = model_home(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path}: expected JSON: {error}") from error
    own = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    architectures = config.get("architectures") or [""]
    if not str(architectures[0]).endswith(f"For{head}"):
        return {"num_labels": len(labels), **own}, None
    # What transformers takes for a configuration that names no labels.
    named = {int(n): str(name) for n, name in (config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}).items()}
    order = tuple(named[i] for i in range(len(named)))
    if set(labels) <= set(order):
        return {}, order
    numbers = tuple(map(str, range(len(order))))
    if set(labels) <= set(numbers):
        return {}, numbers
    unknown = sorted(set(labels) - set(order))
    raise DataError(
        f"{path}: the model has the classes {', '.join(order[:10])}, the data also {', '.join(unknown[:10])}; relabel "
        "the data, or start from a model without this head"
    )
