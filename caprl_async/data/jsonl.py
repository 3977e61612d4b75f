"""Reads lines of JSON: one object per line, with what is wrong in a line told apart from a wrong file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caprl_async.data.rows import DataError, Reject, place


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """(line number from 1, object or reject) of every line that is not blank.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(place(path, number), line)
    except OSError as error:
        raise DataError(f"{path}: not readable: {error}") from error


def _object(name: str, line: bytes) -> dict[str, Any] | Reject:
    try:
        value = json.loads(line.decode("utf-8-sig"))  # editors put a mark before the first line
    except UnicodeDecodeError as error:
        return Reject(name, None, "malformed_json", f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Reject(name, None, "malformed_json", str(error))
    if not isinstance(value, dict):
        return Reject(name, None, "malformed_json", "a line must hold an object")
    return value
