"""Reads the CapRL-QA form: parquet with `id`, `image` or `video`, `prompt`, `reward_model.ground_truth`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caprl_async.data.parquet import parquet_records
from caprl_async.data.questions import collect, from_mapping, literal
from caprl_async.data.rows import BadRow, Reject, Row, checked, id_of, is_given, place

_NEEDED = ("id", "reward_model")
_SHOWS = ("image", "images", "video", "videos")  # one of them
_OPTIONAL = ("prompt", "reference_caption", "facts")
_SHOWN = 300  # characters of a path


def read(path: Path, abstain: str) -> Iterator[Row | Reject]:
    """Rows and rejects in the file's order.

    Raises:
        DataError: no parquet file, a damaged one, or a column is missing.
    """
    for number, record in parquet_records(path, _NEEDED, _OPTIONAL, _SHOWS):
        yield from read_record(record, place(path, number), path.parent, abstain)


def read_record(record: Mapping[str, Any], name: str, folder: Path, abstain: str) -> Iterator[Row | Reject]:
    """One record of the CapRL-QA form; relative image paths start at `folder`.

    `name` says where the record is, for a reject that has no id.
    """
    row_id, column = name, "id"
    try:
        found = id_of(_cell(record, column), "")
        if not found:
            raise BadRow("missing_id")
        row_id = found
        column = next((name for name in _SHOWS if is_given(record.get(name))), "image")
        image = image_source(_cell(record, column), folder)
        video = column in ("video", "videos")
        column = "reward_model"
        reward_model = _cell(record, column)
        truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
        questions, rejects = collect(row_id, literal(truth), lambda i, q: from_mapping(i, q, abstain), column)
        column = "prompt"
        prompt = checked(prompt_text(_cell(record, column)))
        column = "reference_caption"
        reference_caption = _text_or_none(_cell(record, column))
        column = "facts"
        facts = _text_or_none(_cell(record, column))
    except BadRow as bad:
        yield Reject(row_id, None, bad.reason, bad.detail, column)
        return
    yield from rejects
    if not questions:
        yield Reject(row_id, None, "no_questions", "none of its questions can be asked", "reward_model")
        return
    yield Row(row_id, image, prompt, questions, reference_caption, facts, video)


def _cell(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column)
    if isinstance(value, Exception):
        raise BadRow("unreadable", str(value))
    return value


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
    """What the first user turn says, without the marks of images and videos."""
    if isinstance(value, list):
        users = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        value = users[0].get("content") if users else None
    return value.replace("<image>", "").replace("<video>", "").strip() if isinstance(value, str) else ""


def _text_or_none(value: Any) -> str | None:
    return checked(value) if isinstance(value, str) else None
