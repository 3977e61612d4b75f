"""Images with texts to learn, for supervised training: captions, or answers to prompts; read row by row."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.data.rows import BadRow, DataError, Reject, checked, id_of, is_given, place

SUFFIXES = (".parquet", ".jsonl", ".tar")
_IMAGES = (
    *("image", "path", "jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "bmp", "avif", "jp2", "ppm"),
    "img",
)
"""Columns, or extensions in a tar file."""

_VIDEOS = ("video", "mp4", "webm", "mkv", "mov", "avi")
_TEXTS = ("caption", "captions", "text", "txt", "answer", "reference_caption")
_IDS = ("id", "image_id", "__key__")
_MARKS = re.compile("<image>|<video>")


@dataclass(frozen=True)
class Example:
    """One image or video, what is asked about it, and what may be answered."""

    row_id: str
    image: bytes | Path  # the encoded file, or where it lies
    prompt: str  # empty: the conf's
    texts: tuple[str, ...]  # at least one
    video: bool = False  # `image` is a video


def read_examples(path: Path) -> Iterator[Example | Reject]:
    """The rows of a .parquet, .jsonl or WebDataset .tar file, or of a folder of them, in order.

    A row has an image (`image`: a path from the file's folder, bytes, or {bytes, path}; in a tar file the
    member beside `KEY.txt` or `KEY.json`) or in the same way a `video`; `caption`, `captions` (a list),
    `text` or `answer`, with `prompt` or `question` where it has one; or ShareGPT's `conversations`, of which
    each pair of turns is an example.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    files = [path] if path.is_file() else sorted(f for s in SUFFIXES for f in path.glob(f"*{s}"))
    if not files or any(file.suffix not in SUFFIXES for file in files):
        raise DataError(f"{path}: no {', '.join(SUFFIXES)} file with images and texts")
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            yield from _examples(row, file, number)


def _examples(row: Mapping[str, Any] | Reject, file: Path, number: int) -> Iterator[Example | Reject]:
    if isinstance(row, Reject):
        yield row
        return
    where = place(file, number)
    try:
        row_id = id_of(next((row[name] for name in _IDS if row.get(name) is not None), None), where)
        image, video = _image(row, file.parent)
        turns = row.get("conversations")
        pairs = list(_pairs(turns)) if isinstance(turns, list) else [(_prompt(row), _texts(row))]
        for i, (prompt, texts) in enumerate(pairs):
            name = row_id if len(pairs) == 1 else f"{row_id}#{i}"
            asked = checked(_MARKS.sub("", prompt).strip())
            yield Example(name, image, asked, texts, video)
    except BadRow as bad:
        yield Reject(where, None, bad.reason, bad.detail)


def _image(row: Mapping[str, Any], folder: Path) -> tuple[bytes | Path, bool]:
    """What is shown, and whether it is a video."""
    column = next((name for name in (*_VIDEOS, *_IMAGES) if is_given(row.get(name))), "image")
    value = row.get(column)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value, column in _VIDEOS
    if isinstance(value, str) and value:
        return folder / value, column in _VIDEOS
    raise BadRow("no_image", f"it has {', '.join(row)}")


def _prompt(row: Mapping[str, Any]) -> str:
    value = row.get("prompt") or row.get("question") or ""
    if isinstance(value, list):  # as chats are written, and CapRL's question sets
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        value = turns[0].get("content") if turns else ""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        value = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(value, str):
        raise BadRow("malformed_prompt", repr(value)[:100])
    return value


def _texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = next((row[name] for name in _TEXTS if row.get(name) is not None), None)
    found = value if isinstance(value, list) else [value]
    texts = tuple(checked(text.strip()) for text in found if isinstance(text, str) and text.strip())
    if not texts:
        raise BadRow("no_text", f"it has {', '.join(row)}")
    return texts


def _pairs(turns: list[Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(what a person says, what is answered) of a conversation; later turns do not see earlier ones."""
    said = ""
    found = False
    for turn in turns:
        value = turn.get("value") if isinstance(turn, Mapping) else None
        if not isinstance(value, str):
            raise BadRow("malformed_turn", repr(turn)[:100])
        if turn.get("from") in ("human", "user"):
            said = value
        elif turn.get("from") in ("gpt", "assistant") and value.strip():
            found = True
            yield said, (checked(value.strip()),)
    if not found:
        raise BadRow("no_text", "no turn answers")


def _rows(file: Path) -> Iterator[Mapping[str, Any] | Reject]:
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(64):
                    yield from batch.to_pylist()
        elif file.suffix == ".tar":
            yield from _tar(file)
        else:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, 1):
                    yield _object(line, place(file, number))
    except (pa.ArrowException, OSError, tarfile.TarError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _object(text: str | bytes, where: str) -> Mapping[str, Any] | Reject:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Reject(where, None, "malformed_json", str(error)[:200])
    return row if isinstance(row, dict) else Reject(where, None, "malformed_json", "not an object")


def _tar(file: Path) -> Iterator[Mapping[str, Any] | Reject]:
    """Samples of a tar file: members that stand together and are equal up to the first dot of their names."""
    sample: dict[str, Any] = {}
    key = ""
    with tarfile.open(file) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            first, _, extension = name.partition(".")
            opened = tar.extractfile(member) if member.isfile() else None
            if opened is None or first.startswith("_") or not first:
                continue
            stem, extension = f"{folder}/{first}" if folder else first, extension.lower()
            if stem != key and sample:
                yield sample
                sample = {}
            key = stem
            sample.setdefault("__key__", f"{file.name}/{key}")
            data = opened.read()
            if extension == "json":
                found = _object(data, f"{file.name}/{key}")
                if isinstance(found, Reject):
                    yield found
                    sample = {}
                    continue
                sample = {**{k: v for k, v in found.items() if k not in (*_IMAGES, *_VIDEOS)}, **sample}
            elif extension == "txt":
                sample["txt"] = data.decode("utf-8", errors="replace")
            else:
                sample[extension] = data
        if sample:
            yield sample
