"""Reads lines of JSON: one object per line, with what is wrong in a line told apart from a wrong file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caprl_async.data.rows import DataError, Reject


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """(line number from 1, object or reject) of every line that is not blank.

    Raises:
        DataError: the file cannot be read as text.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error


def _object(path: Path, number: int, line: str) -> dict[str, Any] | Reject:
    try:
        value = json.loads(line)
    except ValueError as error:
        return Reject(f"{path.stem}:{number}", None, "malformed_json", str(error))
    if not isinstance(value, dict):
        return Reject(f"{path.stem}:{number}", None, "malformed_json", "a line must hold an object")
    return value


def row_id(record: Mapping[str, Any], path: Path, number: int) -> str:
    """The record's own id, or file and line."""
    return str(record["id"]) if record.get("id") not in (None, "") else f"{path.stem}:{number}"
