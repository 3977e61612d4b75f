"""How a caption's verdicts, length and format become its reward; between the judge and the queue."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from caprl_async.config import RewardConfig
from caprl_async.types import Outcome, RewardParts, Verdict

_BRACKET = re.compile(r"\[([^\[\]]*\d\s*:\s*\d[^\[\]]*)\]")
_STAMP = re.compile(r"\s*(\d{1,3}):(\d{2})\s*(?:-\s*(\d{1,3}):(\d{2})\s*)?")


def reward_parts(
    verdicts: Sequence[Verdict],
    weights: Sequence[float],
    *,
    tokens: int,
    text: str,
    config: RewardConfig,
) -> RewardParts:
    """R = w_acc * accuracy + w_len * R_len + w_fmt * R_format (arXiv 2606.09393; CapRL is w_acc alone).

    accuracy = sum_q w_q d_q s_q / sum_q w_q d_q over the *scored* questions q with d_q draws: one that was
    not scored leaves the mean and counts as nothing. With fewer than `quorum` of the asked questions
    scored, `total` is None.

    Args:
        verdicts: one per question; those that were not asked do not count.
        weights: of the questions, in the same order.
        tokens: length of the caption in the policy's tokens.
    """
    scored = [
        (verdict.score, weight * verdict.draws)
        for verdict, weight in zip(verdicts, weights, strict=True)
        if verdict.outcome is Outcome.SCORED and verdict.score is not None
    ]
    asked = sum(verdict.outcome is not Outcome.NOT_ASKED for verdict in verdicts)
    accuracy = _weighted_mean(scored)
    length = length_term(tokens, config.length_free, config.length_max)
    layout = format_term(text) if config.format else 0.0
    total = None
    if accuracy is not None and len(scored) >= config.quorum * asked:
        total = config.accuracy * accuracy + config.length * length + config.format * layout
    return RewardParts(
        total=total,
        accuracy=accuracy,
        length=length,
        format=layout,
        scored=len(scored),
        asked=asked,
    )


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
