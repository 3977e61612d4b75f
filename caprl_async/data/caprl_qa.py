"""Reads the CapRL-QA form: parquet with `id`, `image`, `prompt`, `reward_model.ground_truth`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.data.questions import collect, from_mapping, literal
from caprl_async.data.rows import BadRow, DataError, Reject, Row

_NEEDED = ("id", "image", "reward_model")
_OPTIONAL = ("prompt", "reference_caption", "facts")
_BATCH = 256  # rows decoded at a time
_SHOWN = 300  # characters of a path


def read(path: Path, abstain: str) -> Iterator[Row | Reject]:
    """Rows and rejects in the file's order.

    Raises:
        DataError: no parquet file, or a column is missing.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    with file:
        columns = file.schema_arrow.names
        for name in _NEEDED:
            if name not in columns:
                raise DataError(f"{path}: column {name!r} is missing; the file has {', '.join(columns)}")
        wanted = [name for name in (*_NEEDED, *_OPTIONAL) if name in columns]
        for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
            for record in batch.to_pylist():
                yield from read_record(record, path.parent, abstain)


def read_record(record: Mapping[str, Any], folder: Path, abstain: str) -> Iterator[Row | Reject]:
    """One record of the CapRL-QA form; relative image paths start at `folder`."""
    row_id = str(record.get("id") or "")
    try:
        if not row_id:
            raise BadRow("missing_id")
        image = image_source(record.get("image"), folder)
        reward_model = record.get("reward_model")
        truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
        questions, rejects = collect(row_id, literal(truth), lambda i, q: from_mapping(i, q, abstain))
    except BadRow as bad:
        yield Reject(row_id, None, bad.reason, bad.detail)
        return
    yield from rejects
    if not questions:
        yield Reject(row_id, None, "no_questions", "none of its questions can be asked")
        return
    yield Row(
        row_id=row_id,
        image=image,
        prompt=prompt_text(record.get("prompt")),
        questions=questions,
        reference_caption=_text_or_none(record.get("reference_caption")),
        facts=_text_or_none(record.get("facts")),
    )


def image_source(value: Any, folder: Path) -> bytes | Path:
    """Encoded bytes, or the path of an existing file, from {bytes, path}, a path, or a list of one of these.

    Raises:
        BadRow: there is none, or more than one.
    """
    if isinstance(value, list):
        if len(value) > 1:
            raise BadRow("several_images", f"{len(value)} images; one is needed")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow("missing_image")
    path = folder / value.removeprefix("file://")
    try:
        found = path.is_file()
    except OSError as error:  # a name too long, as that of an image written out as text
        raise BadRow("missing_image", f"{error.strerror}: {str(path)[:_SHOWN]}") from error
    if not found:
        raise BadRow("missing_image", f"no file {str(path)[:_SHOWN]}")
    return path


def prompt_text(value: Any) -> str:
    """What the first user turn says, without image marks."""
    if isinstance(value, list):
        users = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        value = users[0].get("content") if users else None
    return value.replace("<image>", "").strip() if isinstance(value, str) else ""


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
