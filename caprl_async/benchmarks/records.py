"""One row of a benchmark's file, whatever the file's form, and how a column of it is read."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caprl_async.data.questions import literal, strip_letters
from caprl_async.data.rows import BadQuestion, BadRow, checked, shown
from caprl_async.types import ImageRef

_LETTERS = string.ascii_uppercase
_INLINE = re.compile(r"(?:^|[\s,;.])\(?([A-Z])[):.]\s*(?=\S)")
_HEADING = re.compile(r"\s*(?:Options|Choices)\s*:?\s*$", re.IGNORECASE)


class MissingColumn(BadRow):
    """The row lacks what its benchmark needs."""

    def __init__(self, names: Sequence[str], columns: Sequence[str]) -> None:
        has = ", ".join(columns)[:200]
        super().__init__("missing_column", f"no value in {' or '.join(names)}; the row has {has}")


@dataclass(frozen=True)
class Record:
    """A row's values by column; NaN and empty texts are no values."""

    item_id: str
    images: tuple[ImageRef, ...]
    values: Mapping[str, Any]

    def maybe(self, *names: str) -> Any:
        """The first of these columns that has a value, or None."""
        for name in names:
            value = self.values.get(name)
            if value is not None and value == value and not (isinstance(value, str) and not value.strip()):
                return value
        return None

    def value(self, *names: str) -> Any:
        """
        Raises:
            MissingColumn: none of them has one.
        """
        found = self.maybe(*names)
        if found is None:
            raise MissingColumn(names, list(self.values))
        return found

    def text(self, *names: str) -> str:
        """
        Raises:
            BadRow: none of them has a value, or it is no text that can be used.
        """
        value = self.value(*names)
        if isinstance(value, bool | bytes | Mapping) or not isinstance(value, str | int | float):
            raise BadRow("malformed_text", f"{names[0]}: {shown(value)}")
        return checked(str(value)).strip()

    def maybe_text(self, *names: str) -> str:
        """The same, or an empty text."""
        return self.text(*names) if self.maybe(*names) is not None else ""

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list, or one written as text in square brackets; any other value is a list of one.

        Raises:
            BadRow: none of the columns has a value, or the list holds other things than texts and numbers.
        """
        value = self.value(*names)
        if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
            value = _literal_or_text(value)
        parts = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
            raise BadRow("malformed_list", f"{names[0]}: {shown(value)}")
        return tuple(checked(str(part)).strip() for part in parts)

    def lettered(self, prefix: str = "") -> tuple[str, ...]:
        """Options in columns A, B, C ... (or with a prefix), up to the first without a value."""
        found: list[str] = []
        for letter in _LETTERS:
            if self.maybe(f"{prefix}{letter}", f"{prefix}{letter.lower()}") is None:
                break
            found.append(self.text(f"{prefix}{letter}", f"{prefix}{letter.lower()}"))
        return tuple(found)


def _literal_or_text(text: str) -> Any:
    try:
        return literal(text)
    except BadRow:
        return text  # brackets that are no list, as those of an interval


def unlettered(options: Sequence[str]) -> tuple[str, ...]:
    """Options without their letters, if they carry them.

    Raises:
        BadRow: some carry theirs and some do not.
    """
    try:
        letters, texts = strip_letters(options)
    except BadQuestion as bad:
        raise BadRow(bad.reason, bad.detail) from bad
    by_letter = dict(zip(letters.upper(), texts, strict=True))
    return tuple(by_letter[letter] for letter in sorted(by_letter))


def inline_options(question: str) -> tuple[str, tuple[str, ...]]:
    """Stem and options of a question that ends in "A: one, B: two ..." or "(A) one (B) two" or such lines.

    No options if the letters are not A, B, C ... each once, at the question's end. Where each option is a
    line, lines after the last one belong to the stem.
    """
    marks = list(_INLINE.finditer(question))
    for first in (mark for mark in reversed(marks) if mark[1] == "A"):
        run = [first]
        for mark in (m for m in marks if m.start() > first.start()):
            if mark[1] == _LETTERS[len(run)]:
                run.append(mark)
        if len(run) < 2:
            continue
        ends = [mark.start() for mark in run[1:]] + [len(question)]
        options = tuple(
            question[mark.end() : end].strip().rstrip(",;").strip()
            for mark, end in zip(run, ends, strict=True)
        )
        if not all(options):
            continue
        stem, tail = _HEADING.sub("", question[: first.start()]).strip(), ""
        if all("\n" in question[mark.start() : mark.start() + 1] for mark in run[1:]):
            last, _, tail = options[-1].partition("\n")
            options = (*options[:-1], last.strip())
        return "\n".join(part for part in (stem, tail.strip()) if part), options
    return question.strip(), ()
