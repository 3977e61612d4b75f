"""Checksums of files that must be on the disk before anybody relies on them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeAlias

Digests: TypeAlias = dict[str, tuple[int, str]]
"""Path below some folder -> size in bytes, sha256."""


def digest_file(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or none: under a name of its own (`.part-...`) until it is on the disk."""
    partial = path.with_name(f".part-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, told: Any) -> None:
    """Writes what a person may read, too."""
    write_bytes(path, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())


def sync_file(path: Path) -> None:
    """Returns when what was written to the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
