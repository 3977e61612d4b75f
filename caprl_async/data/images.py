"""Images by content: each is written once, under its hash, where every node of the ring can read it."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from caprl_async.types import ImageRef


class BadImage(ValueError):
    """The image cannot be read or decoded; the message says which and why."""


class ImageStore:
    """A folder of images named by the sha256 of their encoded bytes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, image: bytes | Path) -> ImageRef:
        """Keeps an encoded image (or the file at a path) and returns its reference; may be called twice.

        Raises:
            BadImage: the file cannot be read, or PIL cannot decode it.
        """
        data = _read(image) if isinstance(image, Path) else image
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.folder / sha256[:2] / sha256
        if not target.exists():
            _check(data, str(image) if isinstance(image, Path) else f"image {sha256[:12]}")
            _write(target, data)
        return ImageRef(sha256=sha256, path=str(target))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}") from error


def _check(data: bytes, name: str) -> None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # a full decode: `verify` passes truncated files
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: not in a format that PIL knows") from error
    except Exception as error:  # what a decoder raises at a broken file is anything
        raise BadImage(f"{name}: {error or type(error).__name__}") from error


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(temporary, target)  # readers see all of it or nothing
    except BaseException:
        os.unlink(temporary)
        raise
