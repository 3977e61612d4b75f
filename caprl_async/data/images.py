"""Images by content: each is written once, under its hash, where every node of the ring can read it.

What the store takes, `decode` can read, and so can all who caption it or train on it.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from caprl_async.config import Config
from caprl_async.types import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
"""What is read. Of PIL's other formats one runs a program (EPS), and some change their size as they load."""

_EXTENSIONS = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"} | {
    name: f".{name.lower()}" for name in ("PNG", "WEBP", "GIF", "BMP", "AVIF", "PPM")
}
MAX_BYTES = 1 << 29
MAX_PIXELS = 89_478_485
"""A quarter GiB as RGB: a file of a few bytes may claim any number of pixels."""

MAX_ASPECT = 200
"""Longer side over shorter: the processors of Qwen-VL models take no greater one."""

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")  # PIL would make 255 of all that is brighter than 255 / 65535


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
            BadImage: the file cannot be read, or `decode` refuses it.
        """
        data = _read(image) if isinstance(image, Path) else image
        sha256 = hashlib.sha256(data).hexdigest()
        target = stored_path(self.folder, sha256)
        if not target.exists():
            decode(data, str(image) if isinstance(image, Path) else f"image {sha256[:12]}")
            write_whole(target, data)
        return ImageRef(sha256=sha256, path=str(target))

    def refer(self, image: Path) -> ImageRef:
        """A reference to an image that stays where it is.

        Raises:
            BadImage: see `put`.
        """
        data = _read(image)
        decode(data, str(image))
        return ImageRef(sha256=hashlib.sha256(data).hexdigest(), path=str(image.resolve()))


def image_folder(config: Config, run_dir: Path) -> Path:
    """The store of a run, whose folder may have been moved since."""
    return Path(config.data.image_dir or run_dir / "images")


def stored_path(folder: Path, sha256: str) -> Path:
    """Where a store in this folder has, or would have, an image."""
    return folder / sha256[:2] / sha256


def decode(data: bytes, name: str) -> Image.Image:
    """The (first) picture of an encoded image, as RGB.

    Raises:
        BadImage: it is in none of FORMATS, damaged, or beyond MAX_PIXELS or MAX_ASPECT.
    """
    try:
        with open_checked(io.BytesIO(data)) as image:
            image.load()  # whole: a truncated file has a good header
            if image.mode in _WIDE:
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise BadImage(f"nobody knows which of its numbers are white (mode {image.mode})")
            return image.convert("RGB")
    except Exception as error:  # what a decoder raises at a broken file is anything
        raise BadImage(f"{name}: {error or type(error).__name__}") from error


def media_type(data: bytes) -> str:
    """Of an encoded image, as image/png.

    Raises:
        BadImage: it is none that is read.
    """
    return Image.MIME[_format(data)]


def extension(data: bytes) -> str:
    """What the name of an encoded image's file ends in, as .png.

    Raises:
        BadImage: it is none that is read.
    """
    return _EXTENSIONS[_format(data)]


def _format(data: bytes) -> str:
    """One of FORMATS.

    Raises:
        BadImage: it is none that is read.
    """
    try:
        with open_checked(io.BytesIO(data)) as image:
            # PIL's name of a JPEG with a second picture behind it, as phones write.
            return "JPEG" if image.format == "MPO" else str(image.format)
    except BadImage:
        raise
    except Exception as error:  # of any kind, as PIL's are at a broken header
        raise BadImage(f"{type(error).__name__}: {error}") from error


def open_checked(source: str | Path | IO[bytes]) -> Image.Image:
    """An image of which only the header is read, and found to be within the limits.

    Raises:
        BadImage: it is not, or is no image.
        Exception: whatever PIL raises at a broken header.
    """
    try:
        image = Image.open(source, formats=_known())
    except UnidentifiedImageError as error:
        raise BadImage(f"in none of the formats {', '.join(_known())}, or without a whole header") from error
    longer, shorter = max(image.size), min(image.size)
    if longer * shorter <= MAX_PIXELS and longer <= MAX_ASPECT * shorter:
        return image
    image.close()
    raise BadImage(
        f"{image.width} x {image.height} px; at most {MAX_PIXELS} pixels are read, and no side that is more "
        f"than {MAX_ASPECT} times the other"
    )


@cache
def _known() -> tuple[str, ...]:
    """FORMATS, without those that this Pillow was built without."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read(path: Path) -> bytes:
    if (size := stat_of(path).st_size) > MAX_BYTES:
        raise BadImage(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}") from error


def stat_of(path: Path) -> os.stat_result:
    """
    Raises:
        BadImage: there is no such file, or none can have that name.
    """
    try:
        return path.stat()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte, half a UTF-16 pair
        raise BadImage(f"{str(path)!r}: {error}") from error


def write_whole(target: Path, data: bytes) -> None:
    """Writes a file that others may write at the same time; readers see all of it or nothing."""
    target.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
