"""Reads OpenRLHF jsonl: `message` is a JSON string of turns; the answer turn holds the repr of a list."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caprl_async.data import caprl_qa, jsonl
from caprl_async.data.questions import collect, from_pair, literal
from caprl_async.data.rows import BadRow, Reject, Row, checked, id_of, place

_COLUMN = "message"


def read(path: Path, abstain: str) -> Iterator[Row | Reject]:
    """Rows and rejects in the file's order.

    Raises:
        DataError: the file cannot be read.
    """
    for number, record in jsonl.lines(path):
        if isinstance(record, Reject):
            yield record
        else:
            yield from _row(record, place(path, number), path.parent, abstain)


def _row(record: Mapping[str, Any], name: str, folder: Path, abstain: str) -> Iterator[Row | Reject]:
    row_id, column = name, "id"
    try:
        row_id, column = id_of(record.get("id"), name), _COLUMN
        turns = _turns(record)
        parts = _parts(turns.get("user"))
        image = _image(parts, folder)
        answers = literal(turns.get("answer"))
        prompt = checked(_text(parts))
        questions, rejects = collect(row_id, answers, lambda i, q: from_pair(i, q, abstain), _COLUMN)
    except BadRow as bad:
        yield Reject(row_id, None, bad.reason, bad.detail, column)
        return
    yield from rejects
    if not questions:
        yield Reject(row_id, None, "no_questions", "none of its questions can be asked", _COLUMN)
        return
    yield Row(row_id, image, prompt, questions)


def _turns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Content of the (first) turn of each role."""
    turns = literal(record.get("message"))
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("malformed_message", "`message` is no list of turns")
    contents: dict[str, Any] = {}
    for turn in turns:
        if isinstance(role := turn.get("role"), str):
            contents.setdefault(role, turn.get("content"))
    return contents


def _parts(content: Any) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise BadRow("malformed_message", "the user's turn is no list of parts")
    return content


def _text(parts: list[Mapping[str, Any]]) -> str:
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    return " ".join(text for text in texts if isinstance(text, str)).replace("<image>", "").strip()


def _image(parts: list[Mapping[str, Any]], folder: Path) -> bytes | Path:
    images = [part.get("image") for part in parts if part.get("type") == "image"]
    if len(images) == 1 and isinstance(images[0], str) and images[0].startswith("data:"):
        try:
            return base64.b64decode(images[0].partition(",")[2], validate=True)
        except ValueError as error:  # binascii.Error is one
            raise BadRow("missing_image", f"base64: {error}") from error
    return caprl_qa.image_source(images, folder)
