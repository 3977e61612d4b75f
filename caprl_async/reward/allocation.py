"""Which of an image's questions a group is asked, and with what weight."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import pvariance

import msgspec

from caprl_async.types import Outcome, Question, QuestionKind, Verdict

_MEMORY = 0.3  # share of the newest group in a question's remembered variance
_LEAST = 0.1  # added to each deviation, so that no question is forgotten


@dataclass(frozen=True)
class Allotted:
    """The questions of one group, with the weights they count with."""

    questions: tuple[Question, ...]
    scale: float = 1.0
    """Their weight over that of all questions: 1 where they were drawn by weight alone."""


class Spreads:
    """How much captions of one image have differed on each question; exponential means of variances."""

    def __init__(self, known: Iterable[tuple[str, float]] = ()) -> None:
        self._variances = dict(known)
        self._sum = math.fsum(self._variances.values())

    def learn(
        self, questions: Sequence[Question], verdicts: Sequence[Sequence[Verdict]]
    ) -> list[tuple[str, float]]:
        """Takes in the verdicts [caption][question] of one group; returns what has changed."""
        changed: list[tuple[str, float]] = []
        for i, question in enumerate(questions):
            scores = [row[i].score for row in verdicts if row[i].outcome is Outcome.SCORED]
            found = [score for score in scores if score is not None]
            if len(found) < 2:
                continue
            old = self._variances.get(question.question_id)
            new = pvariance(found)
            mixed = new if old is None else old + _MEMORY * (new - old)
            self._variances[question.question_id] = mixed
            self._sum += mixed - (old or 0.0)
            changed.append((question.question_id, mixed))
        return changed

    def deviations(self, questions: Sequence[Question]) -> list[float]:
        """Of each question's score between captions; one not seen yet has the mean of all that were."""
        known = max(0.0, self._sum) / len(self._variances) if self._variances else 1.0
        return [math.sqrt(self._variances.get(q.question_id, known)) + _LEAST for q in questions]

    def state(self) -> list[tuple[str, float]]:
        """Plain data to go on from."""
        return sorted(self._variances.items())


def weighed(questions: Sequence[Question], absent: float) -> tuple[Question, ...]:
    """The questions, `absent` times the weight for those about absent things; weight 0 leaves one out."""
    weights = [q.weight * (absent if q.kind is QuestionKind.ABSENT else 1.0) for q in questions]
    return tuple(
        msgspec.structs.replace(question, weight=weight)
        for question, weight in zip(questions, weights, strict=True)
        if weight > 0
    )


def allot(questions: Sequence[Question], wanted: int, seed: str, spreads: Spreads | None = None) -> Allotted:
    """`wanted` of the questions (0: all), the same for the same seed; their order is kept.

    Question q is drawn with probability pi_q, proportional to w_q and, with `spreads`, to the deviation of
    its score (Neyman's allocation), at most 1. It counts with w_q / pi_q (Horvitz and Thompson, JASA 1952),
    so that the expectation of sum_q (w_q / pi_q) s_q / sum of all w is the weighted mean over all questions.
    Drawn by weight alone, the drawn weights add up to those of all questions and `scale` is 1. Weights that
    change after the draw (`reward.blind`) make it a ratio of two estimates, which is only nearly unbiased.
    """
    if not wanted or wanted >= len(questions):
        return Allotted(tuple(questions))
    weights = [question.weight for question in questions]
    wishes = weights
    if spreads is not None:
        wishes = [w * s for w, s in zip(weights, spreads.deviations(questions), strict=True)]
    chances = inclusion(wishes, wanted)
    drawn = _systematic(chances, random.Random(seed))
    chosen = tuple(
        msgspec.structs.replace(questions[i], weight=weights[i] / chances[i]) for i in sorted(drawn)
    )
    return Allotted(chosen, math.fsum(q.weight for q in chosen) / math.fsum(weights))


def inclusion(wishes: Sequence[float], wanted: int) -> list[float]:
    """Chances proportional to `wishes` (above 0), each at most 1, that add up to `wanted` of them."""
    certain: set[int] = set()
    while True:
        rest = math.fsum(wish for i, wish in enumerate(wishes) if i not in certain)
        share = (wanted - len(certain)) / rest
        above = {i for i, wish in enumerate(wishes) if i not in certain and wish * share > 1}
        if not above:
            return [1.0 if i in certain else wish * share for i, wish in enumerate(wishes)]
        certain |= above


def _systematic(chances: Sequence[float], rng: random.Random) -> list[int]:
    """Draws as many indices as the chances add up to: equal steps through them in a random order."""
    order = rng.sample(range(len(chances)), len(chances))
    start, reached = rng.random(), 0.0
    drawn: list[int] = []
    for place in order:
        reached += chances[place]
        if reached > start + len(drawn):
            drawn.append(place)
    return drawn
