"""Captions that lie on a disk, by whomever they were made."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.data.rows import DataError
from caprl_async.stream.pipeline import FAILURES
from caprl_async.types import Finish

_COLUMNS = ("sha256", "image", "id", "caption", "captions", "conversations", "finish")
_SUFFIXES = (".parquet", ".jsonl", ".tar")


@dataclass(frozen=True)
class Caption:
    """One caption; whether it was cut at a limit is not known of those made elsewhere."""

    text: str
    truncated: bool | None = None


def read_captions(path: Path) -> dict[str, list[Caption]]:
    """Captions by the image's SHA-256, or by the row's `id` where neither hash nor image is there.

    Read are the folder of a job=annotate (or its `captions`), parquet and jsonl files, and the tar files of
    our WebDataset form. A row has `caption` (a text) or `captions` (a list), or ShareGPT's `conversations`;
    and `sha256`, `image` (a path, from the file's folder, or {bytes, path}) or `id`. Rows of one image add
    up.

    Raises:
        DataError: there is no such file, or a row lacks one of these.
    """
    folder = path / "captions" if (path / "captions").is_dir() else path
    files = [folder] if folder.is_file() else sorted(f for s in _SUFFIXES for f in folder.glob(f"*{s}"))
    files = [file for file in files if file.name != FAILURES]
    if not files:
        raise DataError(f"{path}: no {' or '.join(_SUFFIXES)} file of captions")
    found: dict[str, list[Caption]] = {}
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            key, texts = _key(row, file.parent), _texts(row)
            if not key or not texts:
                raise DataError(
                    f"{file}, row {number}: it needs caption, captions or conversations, and sha256, an "
                    f"image that is there, or id; it has {', '.join(row)[:200]}"
                )
            cut = [finish == Finish.LENGTH.value for finish in row.get("finish") or ()]
            known = cut if len(cut) == len(texts) else [None] * len(texts)
            found.setdefault(key, []).extend(map(Caption, texts, known))
    return found


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix == ".tar":
            yield from _tar(file)
        else:
            with file.open(encoding="utf-8") as lines:
                yield from map(_object, lines)
    except (pa.ArrowException, OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    with pq.ParquetFile(file) as opened:
        columns = [name for name in opened.schema_arrow.names if name in _COLUMNS]
        for batch in opened.iter_batches(256, columns=columns):
            yield from batch.to_pylist()


def _tar(file: Path) -> Iterator[Mapping[str, Any]]:
    with tarfile.open(file) as tar:
        for member in tar:
            opened = tar.extractfile(member) if member.name.endswith(".json") else None
            if opened is not None:
                yield _object(opened.read())


def _object(text: str | bytes) -> Mapping[str, Any]:
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError(f"not an object: {text[:100]!r}")
    return row


def _key(row: Mapping[str, Any], folder: Path) -> str:
    if isinstance(row.get("sha256"), str):
        return str(row["sha256"])
    image = row.get("image")
    if isinstance(image, Mapping):
        if isinstance(image.get("bytes"), bytes):
            return hashlib.sha256(image["bytes"]).hexdigest()
        image = image.get("path")
    if isinstance(image, str) and (folder / image).is_file():
        return hashlib.sha256((folder / image).read_bytes()).hexdigest()
    return str(row["id"]) if row.get("id") is not None else ""


def _texts(row: Mapping[str, Any]) -> list[str]:
    if isinstance(row.get("caption"), str):
        return [row["caption"]]
    if isinstance(row.get("captions"), list):
        return [text for text in row["captions"] if isinstance(text, str)]
    turns = row.get("conversations") or []
    return [turn["value"] for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
