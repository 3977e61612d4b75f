"""What a written answer is worth, 0 to 1, by rule; docs/prism.md says which benchmark has which.

`check` looks at an item's gold answers once, when its file is read: what cannot be compared with is no item.
So a scorer never meets a gold answer that it cannot read, and none is right by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from caprl_async.benchmarks.items import BadGold, Item, Rule
from caprl_async.benchmarks.reading import final_answer, listed, number, numbers_in, read_choice

RELATIVE = 0.05
"""Numbers of ChartQA and ChartQAPro may be off by this share of the gold one."""

ANLS_LEAST = 0.5
"""Similarities below count as 0 (arXiv 2007.00398, equation 1)."""

Scorer = Callable[[str, Item], float]


def score(text: str, item: Item) -> float:
    """Of the whole text that an answerer wrote.

    Raises:
        KeyError: the item's rule is GRADED, which needs a language model.
    """
    return _SCORERS[item.rule](final_answer(text), item)


def check(item: Item) -> None:
    """
    Raises:
        BadGold: the item has no gold answer that an answer could be compared with.
    """
    if not item.golds or not all(gold.strip() for gold in item.golds):
        raise BadGold("no gold answer")
    if item.rule is Rule.CHOICE:
        letters = [chr(ord("A") + index) for index in range(len(item.options))]
        if len(letters) < 2:
            raise BadGold(f"{len(letters)} options")
        strange = [gold for gold in item.golds if gold not in letters]
        if strange:
            raise BadGold(f"gold answer {strange[0]!r} is none of the options A to {letters[-1]}")
    if item.rule is Rule.TYPED and item.kind in ("integer", "float") and number(item.golds[0]) is None:
        raise BadGold(f"gold answer {item.golds[0]!r} is no {item.kind}")
    if item.rule is Rule.TYPED and item.kind == "list" and listed(item.golds[0]) is None:
        raise BadGold(f"gold answer {item.golds[0]!r} is no list")
    if item.rule is Rule.MATH and not _parsed(item.golds[0]):
        raise BadGold(f"gold answer {item.golds[0]!r} is no number and no expression")


# ---------------------------------------------------------------- rules


def choice(answer: str, item: Item) -> float:
    """1 if the answer names the gold option."""
    said = read_choice(answer, item.options)
    return float(said is not None and chr(ord("A") + said) in item.golds)


def exact(answer: str, item: Item) -> float:
    """1 if equal to a gold answer but for case, white space and outer punctuation."""
    return float(_plain(answer) in map(_plain, item.golds))


def relaxed(answer: str, item: Item) -> float:
    """ChartQA (arXiv 2203.10244): numbers within 5 % of the gold one, "%" being hundredths; else exact."""
    return max(_relaxed(answer, gold) for gold in item.golds)


def _relaxed(answer: str, gold: str) -> float:
    said, wanted = _with_percent(answer), _with_percent(gold)
    if said is None or wanted is None:
        return float(_plain(answer) == _plain(gold))
    return float(_near(said, wanted))


def anls(answer: str, item: Item) -> float:
    """Normalised Levenshtein similarity to the nearest gold answer (arXiv 2007.00398, equation 1)."""
    return max(_similar(answer, gold) for gold in item.golds)


def chart_pro(answer: str, item: Item) -> float:
    """ChartQAPro (arXiv 2504.05506): the mean over the parts of the gold answer and of what is said.

    Years, and all parts of fact-checking and multiple-choice questions, must be equal but for case;
    numbers may be off by 5 %; texts count by ANLS. A part too many or too few counts 0.
    """
    parts = listed(answer) or [answer]
    whole = _plain(item.kind) in ("fact checking", "multi choice")
    years = item.years if len(item.years) == len(item.golds) else item.years[:1] * len(item.golds)
    found = [
        _part(part, gold, whole or (index < len(years) and years[index]))
        for index, (part, gold) in enumerate(zip(parts, item.golds, strict=False))
    ]
    return sum(found) / max(len(parts), len(item.golds))


def _part(said: str, gold: str, whole: bool) -> float:
    if whole:
        return float(_plain(said) == _plain(gold))
    said, gold = (text.strip(" %") or text for text in (said, gold))
    numbers = number(said), number(gold)
    if numbers[0] is not None and numbers[1] is not None:
        return float(_near(numbers[0], numbers[1]))
    return _similar(said, gold)


def open_ended(answer: str, item: Item) -> float:
    """MMMU's questions without options: the one number of the answer, to two decimals, or the same words."""
    said = numbers_in(answer)
    for gold in item.golds:
        wanted = number(gold.strip(" $%"))
        if wanted is not None and len(said) == 1 and round(said[0], 2) == round(wanted, 2):
            return 1.0
    return exact(answer, item)


def typed(answer: str, item: Item) -> float:
    """MathVista (arXiv 2310.02255): an integer, a float at the item's precision, a list, or words."""
    (gold,) = item.golds
    if item.kind == "list":
        return float(_same_list(listed(answer), listed(gold)))
    if item.kind not in ("integer", "float"):
        return exact(answer, item)
    said, wanted = numbers_in(answer), number(gold)
    if wanted is None or len(said) != 1:
        return 0.0
    if item.kind == "integer":
        return float(said[0] == wanted)
    return float(math.isclose(round(said[0], item.precision), round(wanted, item.precision), abs_tol=1e-9))


def math_equal(answer: str, item: Item) -> float:
    """1 if answer and gold are one number, set, interval or expression (Math-Verify); main thread only."""
    from math_verify import verify

    said = _parsed(answer)
    return float(bool(said) and any(verify(_parsed(gold), said) for gold in item.golds))


_SCORERS: dict[Rule, Scorer] = {
    Rule.CHOICE: choice,
    Rule.EXACT: exact,
    Rule.RELAXED: relaxed,
    Rule.ANLS: anls,
    Rule.CHART_PRO: chart_pro,
    Rule.OPEN: open_ended,
    Rule.TYPED: typed,
    Rule.MATH: math_equal,
}


# ---------------------------------------------------------------- parts


def _plain(text: str) -> str:
    """Without case, white space and outer punctuation; a text that is nothing else stays what it is."""
    words = " ".join(text.casefold().split())
    return words.strip(" .,;:!?\"'`") or words


def _with_percent(text: str) -> float | None:
    bare = text.strip()
    value = number(bare.removesuffix("%").strip())
    return value / 100 if value is not None and bare.endswith("%") else value


def _near(said: float, gold: float) -> bool:
    """Within 5 % of the gold one: of what is said, a large answer would be let through."""
    return abs(said - gold) <= RELATIVE * abs(gold) * (1 + 1e-12)


def _similar(said: str, gold: str) -> float:
    one, other = (" ".join(text.casefold().split()) for text in (said, gold))
    if not one:
        return 0.0
    one, other = (text.removesuffix(".") or text for text in (one, other))
    similarity = Levenshtein.normalized_similarity(one, other)
    return similarity if similarity >= ANLS_LEAST else 0.0


def _same_list(said: Sequence[str] | None, gold: Sequence[str] | None) -> bool:
    if said is None or gold is None or len(said) != len(gold):
        return False
    return all(
        _plain(one) == _plain(other)
        or ((a := number(one)) is not None and (b := number(other)) is not None and a == b)
        for one, other in zip(said, gold, strict=True)
    )


def _parsed(text: str) -> list[object]:
    """What Math-Verify reads in a text, LaTeX without dollars included; nothing if it reads letters only."""
    from math_verify import parse

    for form in (f"${text}$", text):
        found = parse(form)
        if any(not isinstance(one, str) for one in found):
            return list(found)
    return []
