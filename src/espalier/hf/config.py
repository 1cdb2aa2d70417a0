"""Typed access to the JSON files of a model folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import ModelFormatError, ModelNotFoundError
from espalier.hf.safetensors import parse_json

MAX_JSON = 64 * 2**20
"""Bytes. No configuration comes near; a larger file is something else."""


@dataclass(frozen=True)
class Config:
    """A JSON object of settings. ``defaults`` stand in for keys that are absent or null, as in transformers."""

    path: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @staticmethod
    def read(path: Path, defaults: Mapping[str, Any] | None = None) -> Config:
        """Raises ModelNotFoundError when there is no such file, ModelFormatError when it is no JSON object."""
        return Config(path, read_object(path), defaults or {})

    def over(self, defaults: Mapping[str, Any]) -> Config:
        return Config(self.path, self.values, defaults)

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, key: str, least: int = 1) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(key, f"an integer >= {least}", value)
        return value

    def number(self, key: str) -> float:
        """A finite number >= 0."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self._wrong(key, "a finite number >= 0", value)
        return float(value)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def labels(self) -> int:
        """The number of classes of a head: that of ``id2label``, else ``num_labels``, else two."""
        names = self.get("id2label")
        if isinstance(names, dict | list) and names:
            return len(names)
        return self.integer("num_labels") if self.get("num_labels") is not None else 2

    def _wrong(self, key: str, expected: str, got: object) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {key!r} must be {expected}, got {str(got)[:80]!r}; correct the file")


def read_bytes(path: Path, what: str) -> bytes:
    """A small file. Raises ModelNotFoundError when it is not there, ModelFormatError when it is far too large."""
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file; expected {what}")
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ModelFormatError(f"{path} must be {what} of at most {MAX_JSON} bytes, got {size}")
    return path.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    return parse_json(read_bytes(path, "a JSON file of settings"), str(path))


def inside(folder: Path, relative: object, source: Path) -> Path:
    """The path of a part of a model folder. Raises ModelFormatError when it would lie outside of the folder."""
    if not isinstance(relative, str) or "\0" in relative:
        raise ModelFormatError(f"{source}: expected the path of a part of the model, got {str(relative)[:80]!r}")
    part = Path(relative)
    if part.is_absolute() or ".." in part.parts:
        raise ModelFormatError(
            f"{source}: {relative!r} must lie inside of the model folder; the file is not to be trusted"
        )
    return folder / part
