"""Datasets that the package ``datasets`` has saved on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.data.tabular import Table
from espalier.errors import DataError, MissingDependencyError


def is_dataset(path: Path) -> bool:
    """Whether ``path`` is a folder made by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def read_dataset(path: Path, split: str = "train") -> Table:
    """Read a saved dataset as a table; of a dictionary of datasets, ``split``. Class labels become their names.

    Raises MissingDependencyError without the package datasets, DataError for a folder that is no dataset, is empty, or
    has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a dataset on disk; reading it needs the package datasets: pip install datasets"
        ) from error
    try:
        # Progress bars belong to the command that runs, not to the reader.
        loaded: Any = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a dataset that this version of datasets reads: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: no split {split!r}; it has {', '.join(map(repr, loaded))}: give that folder")
        loaded = loaded[split]
    if len(loaded) == 0:
        raise DataError(f"{path}: the dataset is empty; expected at least one example")
    names = tuple(loaded.column_names)
    values = [_named(loaded[name], loaded.features[name]) for name in names]
    return Table(path, names, tuple(zip(*values, strict=True)), tuple(range(1, len(loaded) + 1)))


def _named(column: Any, feature: Any) -> list[Any]:
    """A column with numbers of classes, alone or in lists, replaced by the names of the classes."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    if names is None:
        return list(column)
    return [[names[v] for v in value] if isinstance(value, list) else names[value] for value in column]
