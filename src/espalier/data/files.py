"""Reading text files strictly: what is not UTF-8 is refused with its place, never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from espalier.errors import DataError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without byte order mark.

    Raises DataError when the file is missing, empty or not UTF-8; the message names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a text file in UTF-8") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: expected UTF-8, got the byte 0x{raw[error.start]:02x}; convert the file, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: expected text, got a zero byte; is this a binary or a UTF-16 file?")
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected at least one example")
    return text


def read_lines(path: Path) -> list[tuple[int, str]]:
    """``(line number from 1, line without its end)`` of every line that is not blank. Raises as :func:`read_text`."""
    # Not splitlines(): it also splits at form feeds and U+2028, and the numbers would not be an editor's.
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises DataError as :func:`read_text`, and for anything that is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
