"""Turns one question of a data file into a `Question`, or says why it cannot be asked; pure functions."""

from __future__ import annotations

import ast
import json
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from caprl_async.data.rows import BadQuestion, BadRow, Reject, checked, shown
from caprl_async.types import Question, QuestionKind

MAX_CHOICES = 25
"""With the abstain option there are 26 options, one per letter."""

_OPEN, _CLOSE = "(\\[（［", ")\\].:）］．："
_LABEL = re.compile(rf"\s*(?:[{_OPEN}]([A-Za-z])[{_CLOSE}]|([A-Za-z])[{_CLOSE}])\s*")
_OPTION_LINE = re.compile(r"\s*(?:[-*]\s+)?((?:\([A-Z]\)|[A-Z][).])\s*.*)")
_ANSWER_LETTER = re.compile(rf"\s*[{_OPEN}]?([A-Za-z])[{_CLOSE}]?\s*")
_LETTERS = string.ascii_uppercase
_WEIGHTS = 1e-6, 1e6
_ZERO_WIDTH = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"


def build_question(
    question_id: str, stem: Any, choices: Any, answer: Any, abstain: str, weight: Any = None
) -> Question:
    """A checked question. `choices` may carry letters ("A)", "A.", "(A)"); `answer`: a letter or a text.

    A choice that says what `abstain` says is taken out. If the answer says it, listed or not, the question
    asks for what is not there (kind ABSENT, answer None). `weight`: a number above 0, or None for 1.

    Raises:
        BadQuestion: it cannot be asked.
    """
    if not isinstance(stem, str) or not _visible(checked(stem)):
        raise BadQuestion("empty_question")
    if not isinstance(choices, Sequence) or isinstance(choices, str | bytes) or not choices:
        raise BadQuestion("no_choices")
    if not all(isinstance(choice, str) for choice in choices):
        raise BadQuestion("malformed_choice", shown(choices))
    checked("".join(choices))
    letters, texts = strip_letters(choices)
    if not all(map(_visible, texts)):
        raise BadQuestion("empty_choice", shown(choices))
    same = [_same(text) for text in texts]
    if len(set(same)) < len(same):
        raise BadQuestion("duplicate_options", shown(texts))
    absent = [text == _same(abstain) for text in same]
    unlisted = not any(absent) and isinstance(answer, str) and _says(answer, abstain)
    gold = None if unlisted else _gold(answer, letters, same)
    kept = tuple(text for text, away in zip(texts, absent, strict=True) if not away)
    if not kept:
        raise BadQuestion("no_choices", "only the abstain option")
    if len(kept) > MAX_CHOICES:
        raise BadQuestion("too_many_options", f"{len(kept)} > {MAX_CHOICES}")
    nothing = gold is None or absent[gold]
    return Question(
        question_id=question_id,
        stem=stem.strip(),
        choices=kept,
        answer=None if gold is None or nothing else gold - sum(absent[:gold]),
        kind=QuestionKind.ABSENT if nothing else QuestionKind.FACT,
        weight=_weight(weight),
    )


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    low, high = _WEIGHTS
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadQuestion(
            "bad_weight", f"weight {shown(value)[:40]} must be a number from {low:g} to {high:g}"
        )
    return float(value)


def _says(answer: str, abstain: str) -> bool:
    """True if the answer is the abstain text, with or without a letter before it."""
    label = _LABEL.match(answer)
    return _same(abstain) in (_same(answer), _same(answer[label.end() :]) if label else "")


def strip_letters(choices: Sequence[str]) -> tuple[str, list[str]]:
    """The letter of each choice and its text without it.

    Letters are taken off only if the choices carry exactly the first n letters: "A. Lincoln" among plain
    names stays whole. Choices without letters are lettered by position.

    Raises:
        BadQuestion: several choices carry their own letter, but not all do: after a shuffle the letters left
            in the texts would lie.
    """
    matches = [_LABEL.match(choice) for choice in choices]
    found = "".join((match.group(1) or match.group(2)) for match in matches if match)
    for letters in (_LETTERS, _LETTERS.lower()):
        if sorted(found) == list(letters[: len(choices)]):
            return found, [c[m.end() :].strip() for c, m in zip(choices, matches, strict=True) if m]
    own = sum(
        match is not None and (match.group(1) or match.group(2)).upper() == letter
        for match, letter in zip(matches, _LETTERS, strict=False)
    )
    if own > 1:
        raise BadQuestion("malformed_letters", shown(choices))
    return _LETTERS[: len(choices)], [choice.strip() for choice in choices]


def split_options(text: str) -> tuple[str, list[str]]:
    """Stem and option lines of a question written as one text, an option per line after the stem."""
    stem: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        match = _OPTION_LINE.fullmatch(line)
        letter = match.group(1).lstrip("(")[0] if match else ""
        if match and letter == "A" and options:  # what looked like options belongs to the stem
            stem, options = [*stem, *options], []
        if match and letter == _LETTERS[min(len(options), 25)]:
            options.append(match.group(1))
        elif options and line.strip():
            options[-1] += " " + line.strip()
        else:
            stem.append(line)
    return "\n".join(stem).strip(), options


def collect(
    row_id: str, entries: Any, build: Callable[[str, Any], Question], column: str
) -> tuple[tuple[Question, ...], list[Reject]]:
    """Builds every entry of a row's list; a bad one costs only itself.

    Raises:
        BadRow: there is no list or it is empty.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes) or not entries:
        raise BadRow("no_questions", "the list of questions is missing or empty")
    questions: list[Question] = []
    rejects: list[Reject] = []
    for position, entry in enumerate(entries):
        try:
            questions.append(build(f"{row_id}/{position}", entry))
        except BadQuestion as bad:
            rejects.append(Reject(row_id, position, bad.reason, bad.detail, column))
    return tuple(questions), rejects


def from_mapping(question_id: str, entry: Any, abstain: str) -> Question:
    """An entry of CapRL-QA and verl files: {question, choices, answer} and, if wanted, weight.

    Raises:
        BadQuestion: it cannot be asked.
    """
    if not isinstance(entry, Mapping):
        raise BadQuestion("malformed_question", f"expected an object, got {type(entry).__name__}")
    missing = [name for name in ("question", "choices", "answer") if entry.get(name) is None]
    if missing:
        raise BadQuestion("malformed_question", f"without {', '.join(missing)}")
    asked = (entry["question"], entry["choices"], entry["answer"])
    return build_question(question_id, *asked, abstain, entry.get("weight"))


def from_pair(question_id: str, entry: Any, abstain: str) -> Question:
    """An entry of OpenRLHF files: (question with option lines, letter).

    Raises:
        BadQuestion: it cannot be asked.
    """
    if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[0], str):
        raise BadQuestion("malformed_question", "expected a pair of question and answer")
    stem, options = split_options(checked(entry[0]))
    return build_question(question_id, stem, options, entry[1], abstain)


def literal(text: Any) -> Any:
    """A list written as JSON or as Python's repr; never evaluated.

    Raises:
        BadRow: it is neither.
    """
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadRow("malformed_answers", f"nested too deeply: {error}") from error
    except ValueError:
        return _python_literal(text)


def _python_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow("malformed_answers", f"neither JSON nor a literal: {error}") from error


def _visible(text: str) -> str:
    """The text without characters that show nothing (zero-width spaces, direction marks)."""
    return "".join(c for c in text if unicodedata.category(c) != "Cf").strip()


def _same(text: str) -> str:
    """Equal for texts that a reader takes for the same option."""
    kept = (c for c in text if c not in _ZERO_WIDTH)
    narrow = "".join(unicodedata.normalize("NFKC", c) if "\uff00" <= c <= "\uffef" else c for c in kept)
    return " ".join(narrow.split()).casefold().rstrip(".") or text


def _gold(answer: Any, letters: str, same: list[str]) -> int:
    if not isinstance(answer, str) or not answer.strip():
        raise BadQuestion("gold_not_an_option", f"answer {shown(answer)}")
    stripped = answer.strip()
    if _same(stripped) in same and stripped not in set(letters):
        return same.index(_same(stripped))
    if (match := _ANSWER_LETTER.fullmatch(stripped)) and match.group(1) in letters:
        return letters.index(match.group(1))
    if (match := _LABEL.match(stripped)) and _same(stripped[match.end() :]) in same:
        named = same.index(_same(stripped[match.end() :]))
        letter = match.group(1) or match.group(2)
        if letter in letters and letters.index(letter) != named:
            raise BadQuestion("contradictory_answer", f"{answer!r}: that letter is another option")
        return named
    raise BadQuestion("gold_not_an_option", f"answer {answer!r}, options {letters!r}")
