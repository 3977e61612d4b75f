"""How a caption's verdicts, length and format become its reward; between the judge and the queue."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec

from caprl_async.config import Blind, RewardConfig
from caprl_async.types import Outcome, Question, QuestionKind, RewardParts, Verdict

_BRACKET = re.compile(r"\[([^\[\]]*\d\s*:\s*\d[^\[\]]*)\]")
_STAMP = re.compile(r"\s*(\d{1,3}):(\d{2})\s*(?:-\s*(\d{1,3}):(\d{2})\s*)?")


TERMS = ("accuracy", "length", "format", "cost")
"""Fields of `RewardParts` that are weighted and added to the reward."""


def term_weights(config: RewardConfig) -> tuple[float, ...]:
    """The weight of each of `TERMS`; that of the cost is negative."""
    return config.accuracy, config.length, config.format, -config.length_cost


def term_values(parts: RewardParts) -> tuple[float, ...]:
    """The value of each of `TERMS` of a caption that has a reward."""
    return parts.accuracy or 0.0, parts.length, parts.format, parts.cost


def reward_parts(
    verdicts: Sequence[Verdict],
    questions: Sequence[Question],
    weights: Sequence[float],
    *,
    tokens: int,
    text: str,
    config: RewardConfig,
    scale: float = 1.0,
) -> RewardParts:
    """R = w_acc * accuracy + w_len * R_len + w_fmt * R_format - cost * tokens / 1000.

    CapRL (arXiv 2509.22647) is w_acc alone, CapRL++ (arXiv 2606.09393) has the three terms.

    accuracy = scale * sum_q w_q d_q s_q / sum_q w_q d_q over the *scored* questions q with d_q draws: one
    that was not scored leaves the mean and counts as nothing. With fewer than `quorum` of the asked
    questions scored, `total` is None.

    Args:
        verdicts: one per question; those that were not asked do not count.
        weights: of the questions, in the same order; a question of weight 0 does not count.
        tokens: length of the caption in the policy's tokens.
        scale: the drawn questions' weight over that of all questions of the image (`allocation.Allotted`).
    """
    asked = [
        (verdict, question, weight)
        for verdict, question, weight in zip(verdicts, questions, weights, strict=True)
        if verdict.outcome is not Outcome.NOT_ASKED and weight > 0
    ]
    scored = [
        (verdict.score, weight * verdict.draws, question.kind)
        for verdict, question, weight in asked
        if verdict.outcome is Outcome.SCORED and verdict.score is not None
    ]
    accuracy = _weighted_mean([(score, weight) for score, weight, _ in scored])
    parts = RewardParts(
        total=None,
        accuracy=None if accuracy is None else accuracy * scale,
        length=length_term(tokens, config.length_free, config.length_max),
        format=format_term(text) if config.format else 0.0,
        cost=tokens / 1000,
        scored=len(scored),
        asked=len(asked),
        fact=_weighted_mean([(s, w) for s, w, kind in scored if kind is QuestionKind.FACT]),
        absent=_weighted_mean([(s, w) for s, w, kind in scored if kind is QuestionKind.ABSENT]),
    )
    if accuracy is None or len(scored) < config.quorum * len(asked):
        return parts
    total = math.fsum(w * v for w, v in zip(term_weights(config), term_values(parts), strict=True))
    return msgspec.structs.replace(parts, total=total)


def counted_weights(
    questions: Sequence[Question], blind: Sequence[Verdict], config: RewardConfig
) -> tuple[float, ...]:
    """The weight of each question once its score on an empty caption is known (none is where it is off).

    Only questions about facts lose weight: those about absent things are right without a caption, by design.
    """
    if config.blind is Blind.off:
        return tuple(question.weight for question in questions)
    return tuple(
        question.weight * _seeing(question, verdict, config)
        for question, verdict in zip(questions, blind, strict=True)
    )


def _seeing(question: Question, blind: Verdict, config: RewardConfig) -> float:
    if question.kind is not QuestionKind.FACT or blind.score is None:
        return 1.0
    if config.blind is Blind.drop:
        return float(blind.score <= config.blind_limit)
    return 1.0 - blind.score


def _weighted_mean(scored: Sequence[tuple[float, float]]) -> float | None:
    weight = math.fsum(w for _, w in scored)
    if weight <= 0:
        return None
    return math.fsum(score * w for score, w in scored) / weight


def length_term(tokens: int, free: int, longest: int) -> float:
    """R_len of CapRL++: 1 up to `free` tokens, then linear to 0 at `longest`."""
    if tokens <= free:
        return 1.0
    if tokens >= longest:
        return 0.0
    return (longest - tokens) / (longest - free)


def format_term(text: str) -> float:
    """R_format of CapRL++: 0.5 * valid / all time stamps + 0.5 * 1[starts do not go back]; 0 without any.

    A stamp is `[mm:ss]` or `[mm:ss - mm:ss]` with ss <= 59 and an end not before its start.
    """
    stamps = [_start(match.group(1)) for match in _BRACKET.finditer(text)]
    starts = [start for start in stamps if start is not None]
    if not starts:
        return 0.0
    return 0.5 * len(starts) / len(stamps) + 0.5 * (starts == sorted(starts))


def _start(stamp: str) -> int | None:
    """Start of a valid stamp in seconds."""
    match = _STAMP.fullmatch(stamp)
    if match is None:
        return None
    minutes, seconds, end_minutes, end_seconds = match.groups()
    if int(seconds) > 59:
        return None
    start = 60 * int(minutes) + int(seconds)
    if end_minutes is not None and (
        int(end_seconds) > 59 or 60 * int(end_minutes) + int(end_seconds) < start
    ):
        return None
    return start
