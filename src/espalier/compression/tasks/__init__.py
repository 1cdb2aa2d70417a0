"""What a network is compressed for: its data, its head, its loss, and the figure that says how good it is."""

from __future__ import annotations

from espalier.compression.tasks.base import Columns, EncoderTask, Outputs, Task, Wants
from espalier.compression.tasks.classification import Classification
from espalier.compression.tasks.custom import CustomTask
from espalier.compression.tasks.embeddings import Embeddings
from espalier.compression.tasks.question_answering import QuestionAnswering
from espalier.compression.tasks.tokens import TokenClassification
from espalier.data.metrics import Interval, Metric, Scores, recovery_interval

TASKS: dict[str, type[EncoderTask]] = {
    "embeddings": Embeddings,
    "question-answering": QuestionAnswering,
    "classification": Classification,
    "tokens": TokenClassification,
}
"""The tasks by the name the command line gives them; adding one is one class and one line here."""

__all__ = [
    "TASKS",
    "Classification",
    "Columns",
    "CustomTask",
    "Embeddings",
    "EncoderTask",
    "Interval",
    "Metric",
    "Outputs",
    "QuestionAnswering",
    "Scores",
    "Task",
    "TokenClassification",
    "Wants",
    "recovery_interval",
]
