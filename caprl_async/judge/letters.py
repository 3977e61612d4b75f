"""Reads the option letter out of a judge's written answer."""

from __future__ import annotations

import re

from caprl_async.judge.prompt import LETTERS

_LEADING_LETTER = re.compile(r"\s*([A-Z])(?=$|[).:\s])")


def read_letter(text: str, options: int) -> int | None:
    """Index of the option that `text` names, or None.

    Only a capital at the very start counts, and only if the answer ends there or `)`, `.`, `:` or white space
    follows: "According to the caption" is not A, and "The answer is B" is nothing.
    """
    match = _LEADING_LETTER.match(text)
    if match is None:
        return None
    index = LETTERS.index(match[1])
    return index if index < options else None
