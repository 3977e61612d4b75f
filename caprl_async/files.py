"""Checksums of files that must be on the disk before anybody relies on them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeAlias

Digests: TypeAlias = dict[str, tuple[int, str]]
"""Path below some folder -> size in bytes, sha256."""


def digest_file(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
