"""Tasks on top of sessions: texts to features, ragged runs, results. Nothing here needs PyTorch."""

from __future__ import annotations

from espalier.pipelines.base import Pipeline, Prepared
from espalier.pipelines.choose import choose
from espalier.pipelines.classification import Label, LabelledToken, TextClassification, TokenClassification
from espalier.pipelines.embeddings import Embeddings
from espalier.pipelines.question_answering import QuestionAnswering

__all__ = [
    "Embeddings",
    "Label",
    "LabelledToken",
    "Pipeline",
    "Prepared",
    "QuestionAnswering",
    "TextClassification",
    "TokenClassification",
    "choose",
]
