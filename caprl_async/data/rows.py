"""What a data set is to the ring: rows of one image and its questions, and what was turned away and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from caprl_async.types import Question


class DataError(ValueError):
    """A data file as a whole cannot be used; the message names the file and, where it applies, the column."""


@dataclass(frozen=True)
class Row:
    """One image with the questions about it."""

    row_id: str
    image: bytes | Path  # the encoded file, or where it lies
    prompt: str  # as the file has it, image marks taken out; may be empty
    questions: tuple[Question, ...]  # at least one
    reference_caption: str | None = None
    facts: str | None = None  # ground truth for `evaluate.program`, as text


@dataclass(frozen=True)
class Reject:
    """One question, or a whole row (`question` None), that was left out."""

    row_id: str
    question: int | None  # position in the file's list
    reason: str
    detail: str = ""


class BadQuestion(ValueError):
    """One question cannot be asked; `reason` is the word that rejects are counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class BadRow(BadQuestion):
    """One row cannot be used."""


@dataclass(frozen=True)
class Dataset:
    """The usable rows of a file, in the file's order."""

    path: Path
    rows: tuple[Row, ...]
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
    known = set(path.read_text(encoding="utf-8").split("\n")) if path.is_file() else set()
    with path.open("a", encoding="utf-8") as out:
        for reject in rejects:
            line = json.dumps({"file": str(file), **asdict(reject)}, ensure_ascii=False)
            if line not in known:
                known.add(line)
                out.write(line + "\n")
