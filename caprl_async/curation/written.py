"""What a questioner is asked to write, and what of its answer is questions. Pure.

The form is the published one of CapRL's data:

    #### 1. **What colour is the circle?**
       - A) red
       - B) blue
    **Answer:** A) red
    ------
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from caprl_async.data.questions import build_question
from caprl_async.data.rows import BadQuestion, Reject
from caprl_async.types import Question

FORM = """\
Write {n} multiple-choice questions about what this image shows: objects, their properties, numbers, text and
places that only someone who sees the image can know. Each has four options, of which exactly one is right.
Write them in this form and write nothing else:

#### 1. **The question?**
   - A) one option
   - B) another
   - C) another
   - D) another
**Answer:** B) another
------
"""
"""The default of `curate.prompt`; `{n}` is `curate.questions`."""

_END = re.compile(r"^\s*-{3,}\s*$", re.MULTILINE)
_HEAD = re.compile(r"\s*#{2,6}\s*\d+\s*[.)]\s*\*\*(.+?)\*\*\s*")
_OPTION = re.compile(r"\s*[-*]\s*([A-Z])[).]\s*(.+?)\s*")
_ANSWER = re.compile(r"\s*\*\*\s*Answer\s*:?\s*\*\*\s*:?\s*([A-Z])[).]?\s*(.*?)\s*")


@dataclass(frozen=True)
class Parsed:
    """What a questioner wrote about one image."""

    questions: tuple[Question, ...]
    rejects: tuple[Reject, ...]


def parse(text: str, row_id: str, abstain: str) -> Parsed:
    """Questions `row_id/0`, `row_id/1`, ...; a block that is not of the form is a reject and costs no other.

    A last block that was cut off is one of them, too.
    """
    questions: list[Question] = []
    rejects: list[Reject] = []
    seen: set[str] = set()
    for position, block in enumerate(_blocks(text)):
        try:
            question = _question(block, f"{row_id}/{position}", abstain)
            if (stem := " ".join(question.stem.casefold().split())) in seen:
                raise BadQuestion("duplicate_question", question.stem)
            seen.add(stem)
            questions.append(question)
        except BadQuestion as bad:
            rejects.append(Reject(row_id, position, bad.reason, bad.detail))
    if not questions and not rejects:
        rejects.append(Reject(row_id, None, "no_questions", text[:200]))
    return Parsed(tuple(questions), tuple(rejects))


def _blocks(text: str) -> Iterator[list[str]]:
    """The lines of each question that are not empty; a heading begins one, too, where the rule is missing."""
    for part in _END.split(text):
        block: list[str] = []
        for line in part.splitlines():
            if _HEAD.fullmatch(line) and block:
                yield block
                block = []
            if line.strip():
                block.append(line)
        if block:
            yield block


def _question(lines: list[str], question_id: str, abstain: str) -> Question:
    """
    Raises:
        BadQuestion: the lines are not a heading, options A, B ..., and an answer among them.
    """
    head, answer = _HEAD.fullmatch(lines[0]), _ANSWER.fullmatch(lines[-1])
    if head is None:
        raise BadQuestion("malformed_heading", lines[0])
    if answer is None or len(lines) < 2:
        raise BadQuestion("malformed_answer", lines[-1])
    options = [_OPTION.fullmatch(line) for line in lines[1:-1]]
    found = [option for option in options if option is not None]
    if len(found) < len(options):
        raise BadQuestion("malformed_option", lines[1 + options.index(None)])
    letters = "".join(option[1] for option in found)
    if letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)] or len(letters) < 2:
        raise BadQuestion("malformed_letters", letters)
    texts = [option[2] for option in found]
    said = f"{answer[1]}) {answer[2]}" if answer[2] else answer[1]
    choices = [f"{letter}) {text}" for letter, text in zip(letters, texts, strict=True)]
    return build_question(question_id, head[1], choices, said, abstain)
