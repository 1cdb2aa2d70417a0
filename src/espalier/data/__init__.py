"""Training and evaluation data: files to checked rows, rows to token features, features to batches without padding."""

from __future__ import annotations

from espalier.data.batching import Batch, Feature, collate, epoch_order, fixed_order, padding_share
from espalier.data.files import read_lines
from espalier.data.hub import read_dataset
from espalier.data.squad import Answer, Question, exact_match, f1, read_squad
from espalier.data.tabular import Table, read_table
from espalier.data.text import read_texts
from espalier.data.tokens import Template, Tokens

__all__ = [
    "Answer",
    "Batch",
    "Feature",
    "Question",
    "Table",
    "Template",
    "Tokens",
    "collate",
    "epoch_order",
    "exact_match",
    "f1",
    "fixed_order",
    "padding_share",
    "read_dataset",
    "read_lines",
    "read_squad",
    "read_table",
    "read_texts",
]
