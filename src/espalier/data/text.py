"""Plain text: one text per line."""

from __future__ import annotations

from pathlib import Path

from espalier.data.files import read_lines


def read_texts(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank, stripped. Raises DataError; see :mod:`.files`."""
    return [line.strip() for _, line in read_lines(path)]
