"""What a benchmark asks, and what an answer is worth."""

from __future__ import annotations

import enum
from dataclasses import dataclass

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


class BadGold(ValueError):
    """No answer to this item can be scored; it is left out and counted, never right by default."""
