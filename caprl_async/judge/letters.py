"""Reads a judge's written answer: an option's letter, or in own words an option's text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from caprl_async.judge.prompt import LETTERS

_LEADING_LETTER = re.compile(r"\s*([A-Z])(?=$|[).:\s])")
_LEAD_IN = re.compile(r"^(?:(?:the )?answer(?: is)?:? |it is |it's |a |an |the )+")
_EDGE = " \t\n.,;:!?\"'`*()[]"


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


def read_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the option whose text the first line of `text` is, or None.

    Case, punctuation around it, articles and lead-ins ("It is", "The answer is") do not count; anything more
    than the option ("red or blue", "not red") is nothing.
    """
    said = plain_option(text.strip().partition("\n")[0])
    plain = [plain_option(option) for option in options]
    return plain.index(said) if said and plain.count(said) == 1 else None


def plain_option(text: str) -> str:
    """An option, or an answer, without what does not count when they are compared."""
    words = " ".join(text.casefold().strip(_EDGE).split())
    return _LEAD_IN.sub("", words) or words
