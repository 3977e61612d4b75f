"""What a benchmark asks, and what an answer is worth."""

from __future__ import annotations

import enum
import string
from dataclasses import dataclass, replace

from caprl_async.types import ImageRef


class Rule(enum.Enum):
    """How an answer is held against the gold one; see `scorers`, and `asking` for GRADED."""

    CHOICE = "choice"  # the option that it names
    EXACT = "exact"  # equal but for case and outer punctuation
    RELAXED = "relaxed"  # ChartQA: numbers within 5 % of the gold one
    ANLS = "anls"  # documents: edit distance to the nearest gold answer
    CHART_PRO = "chart_pro"  # ChartQAPro
    OPEN = "open"  # MMMU without options
    TYPED = "typed"  # MathVista: integer, float of a precision, list or text
    MATH = "math"  # equal as numbers or expressions, LaTeX included
    GRADED = "graded"  # a language model compares


@dataclass(frozen=True)
class Item:
    """One question. Where there are `options`, each gold answer is the letter of one."""

    item_id: str
    images: tuple[ImageRef, ...]  # in the order that the question names them
    question: str  # as it is asked, without the options
    golds: tuple[str, ...]  # any of them is right; CHART_PRO: the parts of the one right answer
    rule: Rule
    options: tuple[str, ...] = ()  # without letters
    category: str = ""
    circle: str = ""  # MMBench: items of one circle are right only together
    kind: str = ""  # TYPED: integer | float | list | text; CHART_PRO: the question's type
    precision: int = 2  # TYPED: decimals of a float
    years: tuple[bool, ...] = ()  # CHART_PRO: which parts are years
    abstain: bool = False  # the last option says that the caption does not tell

    @property
    def absent(self) -> bool:
        """Whether the question asks for what is not there, so that not to answer is right."""
        return self.abstain and self.golds == (string.ascii_uppercase[len(self.options) - 1],)

    @property
    def mere_letters(self) -> bool:
        """Whether the options stand in the image, and only their letters here."""
        return self.options == tuple(string.ascii_uppercase[: len(self.options)])

    @property
    def right(self) -> str:
        """The gold answers as a person reads them."""
        if not self.options or self.mere_letters:
            return " / ".join(self.golds)
        return " / ".join(self.options[string.ascii_uppercase.index(gold)] for gold in self.golds)

    def offering(self, abstain: str) -> Item:
        """The item with one option more, which says that the caption does not tell."""
        if not self.options or self.abstain or self.mere_letters:
            return self
        return replace(self, options=(*self.options, abstain), abstain=True)


class BadGold(ValueError):
    """No answer to this item can be scored; it is left out and counted, never right by default."""
