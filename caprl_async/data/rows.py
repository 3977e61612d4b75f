"""What a data set is to the ring: rows of one image and its questions, and what was turned away and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from caprl_async.types import Question

REJECTS = "rejects.jsonl"
"""Name of the file in a run folder that rejects are written to."""

MAX_TEXT = 100_000
"""Characters of the longest text of a row; no judge's or captioner's context holds more."""

MAX_ID = 500
_SHOWN = 300  # characters of what is wrong with a row


class DataError(ValueError):
    """A data file as a whole cannot be used; the message names the file and, where it applies, the column."""


@dataclass(frozen=True)
class Row:
    """One image, or video, with the questions about it."""

    row_id: str
    image: bytes | Path  # the encoded file, or where it lies
    prompt: str  # as the file has it, image marks taken out; may be empty
    questions: tuple[Question, ...]  # at least one
    reference_caption: str | None = None
    facts: str | None = None  # ground truth for `evaluate.program`, as text
    video: bool = False  # `image` is a video


@dataclass(frozen=True)
class Reject:
    """One question, or a whole row (`question` None), that was left out."""

    row_id: str  # or the place of the row in its file
    question: int | None  # position in the file's list
    reason: str
    detail: str = ""
    column: str = ""  # that holds what is wrong, where it is one


def is_given(value: Any) -> bool:
    """Whether a column says anything: empty texts, lists and {bytes, path} without either do not."""
    if isinstance(value, Mapping):
        return any(map(is_given, value.values()))
    return value is not None and not (isinstance(value, str | bytes | list) and not value)


class BadQuestion(ValueError):
    """One question cannot be asked; `reason` is the word that rejects are counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail[:_SHOWN]
        super().__init__(f"{reason}: {self.detail}" if detail else reason)


class BadRow(BadQuestion):
    """One row cannot be used."""


def place(path: Path, number: int) -> str:
    """Names a row that has no id: its file, and its line or position from 1."""
    return f"{path.stem}:{number}"


def id_of(value: Any, otherwise: str) -> str:
    """A row's id as text; `otherwise` if it has none (NaN is how pandas writes that among numbers).

    Raises:
        BadRow: it is neither text nor a number.
    """
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return otherwise
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("malformed_id", f"a {type(value).__name__}")
    text = checked(str(value))
    if len(text) > MAX_ID:
        raise BadRow("malformed_id", f"{len(text)} characters")
    return text


def checked(text: str) -> str:
    """A text that can be sent, stored and shown.

    Raises:
        BadRow: it is too long, or holds halves of UTF-16 pairs, which no encoding of Unicode has.
    """
    if len(text) > MAX_TEXT:
        raise BadRow("too_long", f"{len(text)} characters > {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not_unicode", str(error)) from error
    return text


def shown(value: Any) -> str:
    """A value in few words, whatever it is."""
    try:
        return repr(value)[:_SHOWN]
    except (ValueError, RecursionError):  # a number of thousands of digits, lists within lists
        return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Dataset:
    """The usable rows of a file, in the file's order."""

    path: Path
    rows: tuple[Row, ...] = ()
    rejects: tuple[Reject, ...] = ()
    _by_id: dict[str, Row] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {row.row_id: row for row in self.rows})

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def get(self, row_id: str) -> Row | None:
        """The row with this id, if the file has it."""
        return self._by_id.get(row_id)

    @property
    def reject_counts(self) -> dict[str, int]:
        """Rejected questions and rows by reason."""
        return dict(Counter(reject.reason for reject in self.rejects))

    def write_rejects(self, path: Path) -> None:
        """Adds what `path` does not hold yet; see `append_rejects`."""
        append_rejects(path, self.path, self.rejects)


def append_rejects(path: Path, file: Path, rejects: Sequence[Reject]) -> None:
    """One JSON line per rejected question or row of a data file, each once, also over resumed runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    known = set(text.split("\n"))
    with path.open("a", encoding="utf-8") as out:
        if text and not text.endswith("\n"):
            out.write("\n")  # whoever wrote the last line died over it
        for reject in rejects:
            line = json.dumps({"file": str(file), **asdict(reject)}, ensure_ascii=False)
            line = line.encode("utf-8", "backslashreplace").decode()  # half a UTF-16 pair becomes its escape
            if line not in known:
                known.add(line)
                out.write(line + "\n")
