"""Questions are kept if the image answers them and nothing else does. Pure.

Each question is answered in several orders of its options, the right one in every place equally often: with
the image, without it, and from the caption that a row may bring.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from caprl_async.benchmarks.reading import final_answer, read_choice
from caprl_async.config import CurateConfig
from caprl_async.judge.permutations import Order, balanced_orders, rotation_of
from caprl_async.types import Question

NONE = "None of the above"
"""The option added where the image is shown: a question whose options are all wrong is a bad one."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers to one question, 0 to 1; None where it was not asked so."""

    with_image: float | None = None
    without_image: float | None = None
    with_caption: float | None = None


def orders(questions: Sequence[Question], permutations: int) -> tuple[tuple[Order, ...], ...]:
    """[question][permutation] of `shown`."""
    return balanced_orders(questions, rotation_of(questions), permutations)


def shown(question: Question, order: Order, seen: bool) -> tuple[str, ...]:
    """The options as they stand: without the image there is no way out."""
    last = len(question.choices)  # in an order, the abstain option
    choices = tuple(question.choices[index] for index in order if index != last)
    return (*choices, NONE) if seen else choices


def prompt(question: Question, order: Order, seen: bool) -> str:
    """What a checker reads."""
    lines = [
        f"{a}) {text}" for a, text in zip(string.ascii_uppercase, shown(question, order, seen), strict=False)
    ]
    return "\n".join([question.stem, *lines, "Answer with the letter of the right option only."])


def is_right(question: Question, order: Order, seen: bool, answer: str) -> bool:
    """Whether an answer names the gold option."""
    options = shown(question, order, seen)
    said = read_choice(final_answer(answer), options)
    return (
        said is not None
        and question.answer is not None
        and options[said] == question.choices[question.answer]
    )


def refusal(found: Accuracy, rules: CurateConfig) -> str:
    """Why the question is not kept; empty: it is."""
    if found.with_image is not None and not found.with_image > rules.with_image_above:
        return "image_does_not_answer"
    if found.with_caption is not None and not found.with_caption > rules.with_caption_above:
        return "caption_does_not_answer"
    if found.without_image is not None and not found.without_image < rules.without_image_below:
        return "answered_without_image"
    return ""
