"""From text to token ids with the ``tokenizer.json`` of a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Template:
    """How a tokenizer frames a pair: ``prefix`` first ``middle`` second ``suffix``, and the type of each part."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    types: tuple[int, int, int, int, int]

    @staticmethod
    def of(tokenizer: Tokenizer) -> Template:
        """Read the frame off an encoded pair. Raises ConfigError when the tokenizer does not frame pairs that way."""
        encoding = tokenizer.encode("a", "b")
        parts: list[list[int]] = [[], [], [], [], []]
        kinds: list[set[int]] = [set(), set(), set(), set(), set()]
        place = 0
        for token, kind, sequence in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
            if sequence == 0:
                place = 1
            elif sequence == 1:
                place = 3
            elif place in (1, 3):
                place += 1
            parts[place].append(token)
            kinds[place].add(kind)
        if not parts[1] or not parts[3] or any(len(kind) > 1 for kind in kinds):
            raise ConfigError(
                "the tokenizer does not put a pair of texts into one sequence; question answering needs that"
            )
        types = tuple(kind.pop() if kind else 0 for kind in kinds)
        return Template(tuple(parts[0]), tuple(parts[2]), tuple(parts[4]), types)  # type: ignore[arg-type]

    @property
    def overhead(self) -> int:
        """Tokens that are neither of the first nor of the second text."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, first: Sequence[int], second: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 and types int8, both ``[tokens]``."""
        parts: tuple[Sequence[int], ...] = (self.prefix, first, self.middle, second, self.suffix)
        ids = np.fromiter((token for part in parts for token in part), np.int32)
        types = np.repeat(np.array(self.types, np.int8), [len(part) for part in parts])
        return ids, types


class Tokens:
    """A tokenizer with a limit on length. Encodes many texts at once."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        special = tokenizer.num_special_tokens_to_add(True)
        if max_length <= special:
            raise ConfigError(f"max_length must exceed the {special} special tokens of a pair, got {max_length}")

    @staticmethod
    def read(folder: Path, max_length: int) -> Tokens:
        """Read ``tokenizer.json``. Raises as :func:`espalier.hf.load_tokenizer`."""
        from espalier.hf import load_tokenizer

        return Tokens(load_tokenizer(folder), max_length)

    def encode(self, first: Sequence[str], second: Sequence[str] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per text, or per pair: ids int32 and types int8, cut to ``max_length`` tokens with special tokens."""
        inputs: list[Any] = list(first) if second is None else list(zip(first, second, strict=True))
        self.tokenizer.enable_truncation(self.max_length)
        try:
            # In slices, because encodings are large objects and only two arrays of each are kept.
            found: list[tuple[np.ndarray, np.ndarray]] = []
            for start in range(0, len(inputs), 4096):
                for e in self.tokenizer.encode_batch(inputs[start : start + 4096]):
                    found.append((np.array(e.ids, np.int32), np.array(e.type_ids, np.int8)))
            return found
        finally:
            self.tokenizer.no_truncation()

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """ids and types as :meth:`encode`, and int32 ``[tokens, 2]``: the characters that each token stands for."""
        self.tokenizer.enable_truncation(self.max_length)
        try:
            encoded = self.tokenizer.encode_batch(list(texts))
        finally:
            self.tokenizer.no_truncation()
        return [
            (np.array(e.ids, np.int32), np.array(e.type_ids, np.int8), np.array(e.offsets, np.int32).reshape(-1, 2))
            for e in encoded
        ]

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[int | None]]:
        """ids and types as :meth:`encode`, and for every token the index of its word (None for special tokens)."""
        self.tokenizer.enable_truncation(self.max_length)
        try:
            e = self.tokenizer.encode(list(words), is_pretokenized=True)
        finally:
            self.tokenizer.no_truncation()
        return np.array(e.ids, np.int32), np.array(e.type_ids, np.int8), list(e.word_ids)
