"""What was answered to questions, and the figures of that. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.summary import Interval, Scores, Summary, summarise

HONEST = 0.05
"""What CaptionQA gives for "cannot answer" on top of a guess."""


@dataclass(frozen=True)
class Told:
    """The answers to one question, one from each caption of its image."""

    answers: Sequence[str]
    scores: Sequence[float | None]  # None: a grader or judge gave none
    abstained: Sequence[float | None] = ()  # how far each says that the caption does not tell; or not known
    blind: float | None = None  # the score without any caption
    ceiling: float | None = None  # and from the reference caption


Examined: TypeAlias = Mapping[str, Told]
"""By item id; an item whose image has no caption is not in it."""


@dataclass(frozen=True)
class Figures:
    """What one captioner reached."""

    summary: Summary
    blind: Interval | None  # floor: what is answered without a caption
    ceiling: Interval | None  # what is answered from reference captions, where there are some
    caption_qa: Interval | None  # of choice questions that offer not to answer, about what is there

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        return {**told.pop("summary"), **told}


def figures(items: Sequence[Item], told: Examined, *, macro: bool, seed: int) -> Figures | None:
    """None if nothing has a score."""

    def of(scores: Scores) -> Summary | None:
        return summarise(items, scores, macro, seed)

    every = {item.item_id: told[item.item_id].scores for item in items if item.item_id in told}
    summary = summarise(items, every, macro, seed)
    if summary is None:
        return None
    blind = of({name: [one.blind] for name, one in told.items() if one.blind is not None})
    ceiling = of({name: [one.ceiling] for name, one in told.items() if one.ceiling is not None})
    honest = of({item.item_id: caption_qa(item, told[item.item_id]) for item in items if _offers(item, told)})
    return Figures(
        summary,
        blind.mean if blind else None,
        ceiling.mean if ceiling else None,
        honest.mean if honest else None,
    )


def caption_qa(item: Item, told: Told) -> list[float | None]:
    """CaptionQA's score of each answer: 1 for the right option, 1 / options + 0.05 for saying that the
    caption does not tell, 0 for a wrong one; of a judge's probabilities the expectation of that."""
    guess = 1 / (len(item.options) - 1) + HONEST
    return [
        None if score is None or away is None else min(1.0, score + away * guess)
        for score, away in zip(told.scores, told.abstained, strict=True)
    ]


def _offers(item: Item, told: Examined) -> bool:
    return (
        item.item_id in told
        and item.rule is Rule.CHOICE
        and item.abstain
        and not item.absent
        and any(away is not None for away in told[item.item_id].abstained)
    )
