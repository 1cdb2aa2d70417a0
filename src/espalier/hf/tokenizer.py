"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import MissingDependencyError, ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The ``tokenizers.Tokenizer`` in ``tokenizer.json``, with padding and truncation switched off.

    Padding would cost what a ragged run saves, and truncation is a decision for the caller.

    Raises MissingDependencyError without the package tokenizers, ModelNotFoundError without ``tokenizer.json``,
    ModelFormatError when that is corrupt.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "reading a tokenizer needs the package tokenizers, which is not installed: pip install tokenizers"
        ) from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{path}: no such file; expected a fast tokenizer. Save one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelFormatError(f"{path} is not a tokenizer this version of tokenizers reads: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
