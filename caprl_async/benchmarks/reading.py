"""Reads what an answerer has written: its final answer, the option that it names, the number that it is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from caprl_async.data.questions import literal
from caprl_async.data.rows import BadRow
from caprl_async.judge.letters import plain_option

_BOX = re.compile(r"\\boxed\s*\{")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_LEAD = re.compile(r"(?:final\s+|correct\s+)?answer\s*(?:is|:)\s*:?", re.IGNORECASE)
_LETTER = re.compile(r"[\s(\[*]*([A-Z])(?:[\s)\].:*]*|[)\].:]\**\s*(?P<rest>.+))", re.DOTALL)
_REASONED = re.compile(r"[\s(\[*]*([A-Z])[)\].:]*\**[ \t]*(?:[,;\n]|(?:because|as|since)\b).*", re.DOTALL)
_NAMED = re.compile(r"(?:option|choice)\s+[(\[]?([A-Z])\b[)\].]?", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|\.)?(?:[eE][-+]?\d+)?")
_IN_TEXT = re.compile(  # possessive: a number is never cut short, as 3 of "3.5cm" would be
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d++)?"
    r"(?!\.?\d|(?:st|nd|rd|th)\b)"
)
_ESCAPED = re.compile(r"\\([$%&_#])")


def final_answer(text: str) -> str:
    r"""What the last `\boxed{}` holds; else the line after the last "answer is" or "Answer:"; else all of it.

    A box that is never closed, as of an answer that was cut off, holds nothing.
    """
    boxes = [_closed(text, match.end()) for match in _BOX.finditer(text)]
    if boxes:
        return _bare(boxes[-1] or "")  # what stands in a box is meant as it is, its full stop too
    leads = list(_LEAD.finditer(text))
    if leads:
        after = text[leads[-1].end() :].strip().partition("\n")[0]
        if after:
            return _bare(_unstopped(after))
    return _bare(_unstopped(text))


def read_choice(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that a final answer names: by its letter, its letter and text, or its text.

    A letter with the text of another option names none.
    """
    plain = [plain_option(option) for option in options]
    said = plain_option(answer)
    by_text = plain.index(said) if said and plain.count(said) == 1 else None
    bare = answer.strip()
    letter = bare.upper() if len(bare) == 1 else bare
    match = _LETTER.fullmatch(letter) or _NAMED.fullmatch(bare.strip("."))
    if match is None and by_text is None:
        match = _REASONED.fullmatch(bare)
    if match is None:
        return by_text
    index = ord(match[1].upper()) - ord("A")
    if index >= len(options):
        return by_text
    rest = plain_option(match.groupdict().get("rest") or "")
    if rest and rest in plain and plain[index] != rest:
        return None
    return index


def number(text: str) -> float | None:
    """A text that is one finite number, thousands marked or not; None for anything more."""
    bare = text.strip()
    if not any(c.isdigit() for c in bare) or not _NUMBER.fullmatch(bare):
        return None
    value = float(bare.replace(",", ""))
    return value if math.isfinite(value) else None


def numbers_in(text: str) -> list[float]:
    """Every number that stands by itself in a text, in order; "$120", "3.5cm" and "-3.5%" hold one each."""
    return [float(match.replace(",", "")) for match in _IN_TEXT.findall(text)]


def listed(text: str) -> list[str] | None:
    """The parts of a list written as JSON, as Python's repr, or bare in brackets; None if it is none."""
    bare = text.strip()
    if not (bare.startswith("[") and bare.endswith("]")):
        return None
    try:
        found = literal(bare)
    except BadRow:
        found = [part.strip(" '\"") for part in bare[1:-1].split(",")]
    return [str(part).strip() for part in found] if isinstance(found, list | tuple) else None


def _closed(text: str, begin: int) -> str | None:
    """From `begin` up to the brace that closes what was opened before it."""
    depth = 1
    for position in range(begin, len(text)):
        escaped = position > 0 and text[position - 1] == "\\"
        if text[position] == "{" and not escaped:
            depth += 1
        elif text[position] == "}" and not escaped:
            depth -= 1
            if depth == 0:
                return text[begin:position]
    return None


def _unstopped(text: str) -> str:
    """A sentence without the full stop at its end."""
    text = text.strip().rstrip("*` ")
    return text.removesuffix(".") if not text.endswith("..") else text


def _bare(text: str) -> str:
    r"""Without what only sets an answer off: `\text{}`, a pair of dollars, stars, LaTeX's escapes."""
    while (inner := _WRAPPED.sub(r"\1", text)) != text:
        text = inner
    text = text.strip().strip("*` \t\n")
    while len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return _ESCAPED.sub(r"\1", text.replace("{,}", ","))
