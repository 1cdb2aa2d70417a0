"""Which groups are worth least. One file per score, one row in the table.

A row names the module and the class; it is imported on use, so that configurations can be checked without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from espalier.compression.scores.base import Score

SCORES: dict[str, tuple[str, str]] = {
    "magnitude": ("magnitude", "Magnitude"),
    "wanda": ("wanda", "Wanda"),
    "sparsegpt": ("sparsegpt", "SparseGPT"),
    "obert": ("obert", "OBert"),
    "movement": ("movement", "Movement"),
}


def score_class(name: str) -> type[Score]:
    """The class of a score in the table."""
    module, attribute = SCORES[name]
    found: type[Score] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found
