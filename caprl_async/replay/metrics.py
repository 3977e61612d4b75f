"""What is measured of a batch when it is cut; pure functions of the queue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

from caprl_async.replay.staleness import token_staleness
from caprl_async.types import Finish, Outcome, ScoredGroup, Version

SHOWN_AGES = 3
"""Ages of tokens with a share of their own in the report; older ones share one."""


def batch_metrics(groups: Sequence[ScoredGroup], version: Version, max_staleness: int) -> dict[str, float]:
    """Means over the captions (or verdicts, or tokens) of a batch cut at `version`; lengths in tokens."""
    captions = [caption for scored in groups for caption in scored.group.captions]
    rewards = [parts for scored in groups for parts in scored.rewards]
    verdicts = [verdict for scored in groups for row in scored.verdicts for verdict in row]
    scored_verdicts = [verdict for verdict in verdicts if verdict.outcome is Outcome.SCORED]
    totals = [parts.total for parts in rewards if parts.total is not None]
    ages = token_staleness(groups, version)
    tokens = max(1, sum(ages.values()))
    mixed = [len({span.version for span in caption.spans}) > 1 for caption in captions]
    return {
        "reward_mean": mean(totals),
        "reward_std": pstdev(totals) if totals else 0.0,
        "accuracy_mean": mean(parts.accuracy for parts in rewards if parts.accuracy is not None),
        "accuracy_fact_mean": mean(parts.fact for parts in rewards if parts.fact is not None),
        "accuracy_absent_mean": mean(parts.absent for parts in rewards if parts.absent is not None),
        "reward_length_mean": mean(parts.length for parts in rewards),
        "reward_format_mean": mean(parts.format for parts in rewards),
        "reward_cost_mean": mean(parts.cost for parts in rewards),
        "caption_length_mean": mean(len(caption.token_ids) for caption in captions),
        "truncated_share": mean(caption.finish is Finish.LENGTH for caption in captions),
        "staleness_mean": mean_of_histogram(ages),
        "staleness_max": float(max(ages, default=0)),
        **{f"staleness_share_{age}": ages.get(age, 0) / tokens for age in range(max_staleness + 1)},
        "staleness_share_older": sum(n for age, n in ages.items() if age >= SHOWN_AGES) / tokens,
        "mixed_version_share": mean(mixed),
        "abstain_share": mean(v.abstained for v in scored_verdicts if v.abstained is not None),
        "off_options_mean": mean(v.off_options for v in scored_verdicts if v.off_options is not None),
        "blind_score_mean": mean(
            verdict.score for scored in groups for verdict in scored.blind if verdict.score is not None
        ),
        "blind_dropped_share": mean(
            weight == 0 for scored in groups if scored.blind for weight in scored.weights
        ),
        "unscorable_verdicts": float(sum(v.outcome is Outcome.UNSCORABLE for v in verdicts)),
    }


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing: missing is not zero."""
    listed = list(values)
    return fmean(listed) if listed else math.nan


def mean_of_histogram(histogram: dict[int, int]) -> float:
    """Mean of value -> count; 0 of nothing."""
    total = sum(histogram.values())
    return sum(value * count for value, count in histogram.items()) / total if total else 0.0
