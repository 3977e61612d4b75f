"""What an answerer reads instead of images, and what a grader reads of an answer. Pure."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.reading import final_answer, number

_PLACEHOLDER = re.compile(r"\{(caption|question)\}")

BLIND = """\
You cannot see the image that this question is about. Answer all the same, with what is likeliest.
{question}"""
"""What an answerer reads for the floor that captions are held against."""

GRADE = """\
You compare an answer with the right answer to a question about an image.
Question: {question}
Right answer: {gold}
Answer: {answer}
In the right answer <AND> joins parts that are all needed, and <OR> parts of which one is enough.
Write how much of the right answer the answer says, from 0 (nothing, or something else) to 1 (all of it),
as \\boxed{{number}}."""


def question_text(item: Item) -> str:
    """The question with its options, a line each; options that are mere letters stand in the image."""
    options = () if item.mere_letters else item.options
    lines = [f"{a}) {text}" for a, text in zip(string.ascii_uppercase, options, strict=False)]
    wanted = (
        "the letter of the right option" if item.options else "the answer, a word, a number or a short phrase"
    )
    return "\n".join([item.question, *lines, f"Put {wanted}, into \\boxed{{}}."])


def prompt_text(template: str, captions: Sequence[str], item: Item) -> str:
    """`template` with caption and question filled in; the captions of several images are numbered."""
    told = captions[0] if len(captions) == 1 else "\n".join(
        f"Image {number}: {caption}" for number, caption in enumerate(captions, 1)
    )  # fmt: skip
    values = {"caption": told, "question": question_text(item)}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def grade_text(item: Item, answer: str) -> str:
    """What a grader is asked about one answer."""
    assert item.rule is Rule.GRADED
    return GRADE.format(question=item.question, gold=" <OR> ".join(item.golds), answer=answer)


def read_grade(text: str) -> float | None:
    """The grade that a grader wrote; None if it wrote none from 0 to 1."""
    value = number(final_answer(text))
    return value if value is not None and 0 <= value <= 1 else None
