"""What one update is measured by: agreement of the policies, and how hard the corrections had to work."""

from __future__ import annotations

import math

from torch import Tensor

from caprl_async.learner.losses import TokenStats


def summarise(stats: TokenStats) -> dict[str, float]:
    """Metrics of one update from the tokens of all its captions (T > 0).

    `effective_samples` is `(sum w)^2 / (T * sum w^2)` of the whole weight `importance * ratio`: 1 on policy,
    towards 0 when few tokens carry the update; `effective_samples_raw` that of current / behaviour, which no
    bound tames: how far off policy the batch is, whatever is corrected. The `logprob_gap` is learner minus
    engine; over tokens of staleness 0 (`_fresh`) it is the mismatch of the two programs and nothing else;
    NaN without such tokens.
    """
    whole = (stats.importance * stats.ratio).double()
    gap = stats.gap.double()
    fresh = gap[stats.staleness == 0]
    return {
        "clip_fraction": stats.clipped.mean().item(),
        "ratio_mean": stats.ratio.mean().item(),
        "ratio_max": stats.ratio.max().item(),
        "importance_mean": stats.importance.mean().item(),
        "importance_min": stats.importance.min().item(),
        "importance_max": stats.importance.max().item(),
        "importance_raw_max": stats.raw.max().item(),
        "importance_bounded": stats.bounded.mean().item(),
        "effective_samples": _effective(whole),
        "effective_samples_raw": _effective(gap.exp()),
        "entropy": stats.entropy.mean().item(),
        "kl": stats.kl.mean().item(),
        # k3 from the behaviour to the current policy: how far the policy has moved since it sampled.
        "kl_behaviour": (gap.exp() - 1.0 - gap).mean().item(),
        **_absolute("logprob_gap", gap),
        **_absolute("logprob_gap_fresh", fresh),
        "token_staleness_mean": stats.staleness.double().mean().item(),
        "token_staleness_max": stats.staleness.double().max().item(),
    }


def _effective(weights: Tensor) -> float:
    squares = weights.square().sum().item()
    return (weights.sum().item() ** 2 / (len(weights) * squares)) if squares else 0.0


def _absolute(name: str, values: Tensor) -> dict[str, float]:
    if not len(values):
        return {f"{name}_{part}": math.nan for part in ("mean", "p99", "max")}
    size = values.abs()
    rank = min(len(size), max(1, round(0.99 * len(size))))  # nearest rank; torch.quantile has a size limit
    return {
        f"{name}_mean": size.mean().item(),
        f"{name}_p99": size.kthvalue(rank).values.item(),
        f"{name}_max": size.max().item(),
    }
