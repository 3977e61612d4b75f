"""Reads verl-style jsonl: CapRL-QA records with a list of paths in `images` or `videos`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from caprl_async.data import caprl_qa, jsonl
from caprl_async.data.rows import BadRow, Reject, Row, id_of, place


def read(path: Path, abstain: str) -> Iterator[Row | Reject]:
    """Rows and rejects in the file's order.

    Raises:
        DataError: the file cannot be read.
    """
    for number, record in jsonl.lines(path):
        if isinstance(record, Reject):
            yield record
            continue
        try:
            row_id = id_of(record.get("id"), place(path, number))
        except BadRow as bad:
            yield Reject(place(path, number), None, bad.reason, bad.detail, "id")
            continue
        yield from caprl_qa.read_record({**record, "id": row_id}, row_id, path.parent, abstain)
