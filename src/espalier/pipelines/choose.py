"""Which task a model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from espalier.data import Tokens
from espalier.errors import MissingDependencyError, ModelNotFoundError, UnsupportedModelError
from espalier.pipelines.base import Pipeline
from espalier.pipelines.classification import TextClassification, TokenClassification
from espalier.pipelines.embeddings import Embeddings
from espalier.pipelines.question_answering import QuestionAnswering
from espalier.session import Session

_HEADS: dict[str, type[Pipeline]] = {
    "ForQuestionAnswering": QuestionAnswering,
    "ForSequenceClassification": TextClassification,
    "ForTokenClassification": TokenClassification,
}
_IN_TURN: tuple[type[Pipeline], ...] = (TextClassification, TokenClassification, QuestionAnswering, Embeddings)


def choose(session: Session, folder: Path) -> Pipeline | None:
    """The pipeline for a model, or None where no task here suits it or ``folder`` holds no tokenizer.

    The architecture in the folder's ``config.json`` decides, else the names and ranks of the outputs do.
    """
    config = _config(folder)
    names = [str(name) for name in config.get("architectures") or ()]
    kinds = [kind for head, kind in _HEADS.items() if any(name.endswith(head) for name in names)]
    for kind in kinds or _IN_TURN:
        try:
            tokens = Tokens.read(folder, _max_length(kind, config))
            if issubclass(kind, (TextClassification, TokenClassification)):
                return kind(session, tokens, _labels(config))
            return kind(session, tokens)
        except UnsupportedModelError:
            continue
        except (ModelNotFoundError, MissingDependencyError):
            return None
    return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _labels(config: dict[str, Any]) -> list[str]:
    known = config.get("id2label")
    if not isinstance(known, dict) or not all(str(key).isdigit() for key in known):
        return []
    return [str(label) for _, label in sorted(known.items(), key=lambda entry: int(entry[0]))]


def _max_length(kind: type[Pipeline], config: dict[str, Any]) -> int:
    most = config.get("max_position_embeddings")
    return min(kind.default_max_length, most) if isinstance(most, int) and most > 8 else kind.default_max_length
