"""CSV, TSV and JSON lines with named columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from espalier.data.files import read_lines, read_text
from espalier.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Table:
    """Rows of a file. ``columns`` are names, or "0", "1", ... in a file without a header; ``lines`` count from 1."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """The place of a row, for messages."""
        return f"{self.path}:{self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """The values of a column, one per row. Raises DataError for an unknown name."""
        if name not in self.columns:
            near = get_close_matches(name, self.columns, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{self.path}: no column {name!r}; it has {', '.join(map(repr, self.columns))}{hint}")
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def texts(self, name: str) -> list[str]:
        """A column of texts. Raises DataError for an unknown name, or a value that is no text or blank."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{self.where(row)}: column {name!r} must hold a text, got {str(value)[:40]!r}")
        return values

    def numbers(self, name: str) -> list[float]:
        """A column of finite numbers. Raises DataError for an unknown name or a value that is no number."""
        found: list[float] = []
        for row, value in enumerate(self.column(name)):
            number = _number(value)
            if number is None:
                raise DataError(
                    f"{self.where(row)}: column {name!r} must hold a number, got {str(value)[:40]!r}"
                    + ("; if the first line is a header, give the column by its name" if row == 0 else "")
                )
            found.append(number)
        return found


def read_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """Read a CSV (.csv), TSV (.tsv) or JSON lines (.jsonl) file.

    ``columns`` are the ones that will be asked for. Where all of them are whole numbers, they are positions from 0 and
    a CSV or TSV file has no header line. Without any, the first line is a header unless one of its fields is a number.

    Raises DataError for a file that is empty, not UTF-8, malformed, or lacks one of ``columns``.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        table = _json_lines(path)
    elif suffix in (".csv", ".tsv"):
        table = _delimited(path, "," if suffix == ".csv" else "\t", columns)
    else:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    for name in columns:
        table.column(name)
    return table


def _delimited(path: Path, delimiter: str, columns: Sequence[str]) -> Table:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str, ...]] = []
    lines: list[int] = []
    start = 1
    try:
        for fields in reader:
            # A quoted field may span lines, so a row begins where the one before it ended.
            if fields:
                rows.append(tuple(fields))
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid {path.suffix[1:].upper()}: {error}") from error
    first = rows[0]
    headless = all(name.isdecimal() for name in columns) if columns else any(_number(f) is not None for f in first)
    if headless:
        names = tuple(map(str, range(len(first))))
    else:
        names, rows, lines = tuple(name.strip() for name in first), rows[1:], lines[1:]
        if len(set(names)) != len(names):
            raise DataError(f"{path}:1: the header names a column twice: {', '.join(names)}")
    if not rows:
        raise DataError(f"{path}: there is a header and nothing below it; expected at least one example")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(names):
            raise DataError(f"{path}:{line}: expected {len(names)} fields, got {len(row)}")
    return Table(path, names, tuple(rows), tuple(lines))


def _json_lines(path: Path) -> Table:
    objects: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected an object of columns, got {line.strip()[:40]}")
        if objects and value.keys() != objects[0].keys():
            raise DataError(
                f"{path}:{number}: expected the columns {', '.join(objects[0])}, got {', '.join(value) or 'none'}"
            )
        objects.append(value)
        lines.append(number)
    names = tuple(objects[0])
    return Table(path, names, tuple(tuple(value[name] for name in names) for value in objects), tuple(lines))


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number - number == 0 else None  # neither infinite nor NaN
