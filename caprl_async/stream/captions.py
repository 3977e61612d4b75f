"""Captions that lie on a disk, by whomever they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.data.rows import DataError


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by the image's SHA-256, or by the row's `id` where neither hash nor image is there.

    Read are the folder of a job=annotate (or its `captions`), parquet and jsonl files. A row has `caption` (a
    text) or `captions` (a list), or ShareGPT's `conversations`; and `sha256`, `image` (a path, from the
    file's folder) or `id`. Rows of one image add up.

    Raises:
        DataError: there is no such file, or a row lacks one of these.
    """
    folder = path / "captions" if (path / "captions").is_dir() else path
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.parquet"), *folder.glob("*.jsonl")])
    files = [file for file in files if file.name != "failures.jsonl"]
    if not files:
        raise DataError(f"{path}: no .parquet or .jsonl file of captions")
    found: dict[str, list[str]] = {}
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            key, texts = _key(row, file.parent), _texts(row)
            if not key or not texts:
                raise DataError(
                    f"{file}, row {number}: it needs caption, captions or conversations, and sha256, an "
                    f"image that is there, or id; it has {', '.join(row)[:200]}"
                )
            found.setdefault(key, []).extend(texts)
    return found


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if file.suffix == ".parquet":
            yield from pq.read_table(file).to_pylist()
            return
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"not an object: {line[:100]}")
                yield row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _key(row: Mapping[str, Any], folder: Path) -> str:
    if isinstance(row.get("sha256"), str):
        return str(row["sha256"])
    image = row.get("image")
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
