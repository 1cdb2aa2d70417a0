"""Settings that suit a task, for whoever does not say otherwise, and recipes in files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.errors import ConfigError

_LABELS_ONLY = {"task": 1.0, "logits": 0.0, "hidden": 0.0, "embeddings": 0.0, "attention": 0.0}
_LABELS_AND_TEACHER = {
    "task": 0.5,
    "logits": 1.0,
    "hidden": 0.5,
    "embeddings": 0.0,
    "attention": 0.0,
    "temperature": 2.0,
}
_TEACHER_ONLY = {"task": 0.0, "logits": 0.0, "hidden": 1.0, "embeddings": 2.0, "attention": 0.0}

_LENGTHS = {"embeddings": 128, "question-answering": 384, "classification": 128, "tokens": 256}


def defaults(task: str, *, sparse: bool) -> dict[str, Any]:
    """Settings for a task as a dict for ``Config.from_dict``: what to learn from, and how long sequences may be.

    Pruned networks learn from the dense one, and from labels where the task has some; dense ones from labels.
    """
    with_labels = _LABELS_AND_TEACHER if sparse else _LABELS_ONLY
    recovery = _TEACHER_ONLY if task == "embeddings" else with_labels
    return {"recovery": dict(recovery), "training": {"max_length": _LENGTHS.get(task, 128)}}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` in their places; tables are merged field by field."""
    found = dict(base)
    for name, value in over.items():
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file, unchecked. Raises ConfigError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; expected a recipe in TOML or JSON") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a recipe in TOML or JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected settings by name, got {type(value).__name__}")
    return value
