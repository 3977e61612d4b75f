"""A few held-out images captioned beside each batch: does what training gains show outside of it?

Two gaps tell a captioner that learns to please from one that learns to describe: training accuracy against
the same judge's on images that are never trained on, and that judge against one that training never meets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from caprl_async.reward.allocation import weighed
from caprl_async.types import Outcome, Question, Verdict

Answers = Sequence[tuple[Question, Verdict]]
"""The questions about one caption with a judge's verdicts."""

_WINDOW = 64  # images over which means are taken; for training, the batches that go with them
_ENOUGH = 32  # images before anything is said


class Probe:
    """Scores of the images probed last, with `reward.absent` in the weights; `reward.blind` is left out."""

    def __init__(self, absent: float, images: int) -> None:
        """`absent` is `reward.absent`; `images` are probed with each batch."""
        self._absent = absent
        self._scores: dict[str, deque[float]] = {}  # judge -> per image
        self._training: deque[float] = deque(maxlen=max(1, _WINDOW // max(1, images)))
        self._start: float | None = None  # judge minus held-out judge, at first

    def trained_on(self, accuracy: float) -> None:
        """Takes in the mean accuracy of the captions judged between two batches, filtered ones too."""
        if math.isfinite(accuracy):
            self._training.append(accuracy)

    def take(self, answers: Mapping[str, Iterable[Answers]]) -> None:
        """Takes in the verdicts of each judge on each probed image."""
        for judge, images in answers.items():
            known = self._scores.setdefault(judge, deque(maxlen=_WINDOW))
            known.extend(score for image in images if (score := self._score(image)) is not None)
        difference = self._difference()
        if self._start is None and not math.isnan(difference):
            self._start = difference

    def _score(self, image: Answers) -> float | None:
        pairs = [
            (question.weight * verdict.draws, verdict.score)
            for asked, verdict in image
            if verdict.outcome is Outcome.SCORED and verdict.score is not None
            for question in weighed([asked], self._absent)
        ]
        weight = math.fsum(w for w, _ in pairs)
        return math.fsum(w * score for w, score in pairs) / weight if weight else None

    def metrics(self) -> dict[str, float]:
        """Means over the window, 0..1, and the gaps; NaN until 32 images have been probed."""
        heldout = self._mean("judge")
        training = fmean(self._training) if self._training else math.nan
        return {
            "heldout_score": heldout,
            "heldout_judge_score": self._mean("heldout"),
            "gap_heldout": training - heldout,
            "gap_judges": self._difference() - (math.nan if self._start is None else self._start),
        }

    def _mean(self, judge: str) -> float:
        scores = self._scores.get(judge, ())
        return fmean(scores) if len(scores) >= _ENOUGH else math.nan

    def _difference(self) -> float:
        return self._mean("judge") - self._mean("heldout")

    def state(self) -> dict[str, Any]:
        """Plain data to go on from."""
        return {
            "scores": {judge: list(scores) for judge, scores in self._scores.items()},
            "training": list(self._training),
            "start": self._start,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a `state`."""
        self._scores = {judge: deque(scores, _WINDOW) for judge, scores in state["scores"].items()}
        self._training = deque(state["training"], self._training.maxlen)
        self._start = state["start"]
