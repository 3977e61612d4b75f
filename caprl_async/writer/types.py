"""What a model is asked to write, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from caprl_async.types import Finish, ImageData, ImageRef


@dataclass(frozen=True)
class Ask:
    """One user turn. All of its text is data: nothing in it opens or closes a turn."""

    text: str
    image: ImageRef | ImageData | None = None  # shown before the text
    n: int = 1  # answers
    seed: int | None = None


@dataclass(frozen=True)
class Text:
    """One answer."""

    text: str
    finish: Finish
    tokens: int | None  # None where a server does not say


@dataclass(frozen=True)
class Unwritten:
    """Why an ask has no answer, and whether it may have one if it is asked again."""

    reason: str
    again: bool


Written = tuple[Text, ...] | Unwritten
"""The n answers to an ask, or why there are none."""


def draws(ask: Ask, temperature: float) -> int:
    """Answers that must be drawn: at temperature 0 all n are one, and vLLM draws no second."""
    return ask.n if temperature > 0 else 1


class WriterError(ValueError):
    """The model cannot be used as configured; the message names the conf key."""
