"""The policy loss on tokens: decoupled PPO with truncated importance weights, and its statistics.

Three policies meet in it. `behaviour` sampled the tokens, `proximal` is the one the update stays close to,
`current` is being trained. Everything is a flat vector over caption tokens, [T].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caprl_async.config import Aggregation, CorrectionConfig


def token_weights(lengths: Sequence[int], aggregation: Aggregation) -> list[float]:
    """What one token of each caption weighs in the loss of an update; `lengths` are of *all* its captions.

    token_mean: every token `1 / sum of lengths`.
    sequence_mean: a token of caption i `1 / (captions * length_i)`.
    The weights of all tokens sum to 1 over micro-batches and ranks, so neither changes the gradient.
    """
    if aggregation is Aggregation.token_mean:
        total = sum(lengths)
        return [1.0 / total] * len(lengths)
    return [1.0 / (len(lengths) * length) for length in lengths]


@dataclass(frozen=True)
class TokenStats:
    """What happened to each token in one loss call; all [T], detached."""

    ratio: Tensor  # current / proximal
    importance: Tensor  # proximal / behaviour, truncated
    clipped: Tensor  # 1 where the clip took the gradient away
    gap: Tensor  # current - behaviour log-probability
    kl: Tensor  # k3 estimate to the reference; 0 without one


def policy_loss(
    current: Tensor,
    proximal: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    weights: Tensor,
    correction: CorrectionConfig,
    *,
    reference: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, TokenStats]:
    """Loss of the tokens at hand; the losses of all micro-batches of all ranks add up to the update's loss.

        w_t = min(exp(proximal_t - behaviour_t), importance_max), no gradient
        r_t = exp(current_t - proximal_t)
        loss = sum_t weights_t * (-w_t * min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + kl_coef * k3_t)
        k3_t = exp(reference_t - current_t) - (reference_t - current_t) - 1

    Decoupled objective: arXiv 2110.00641 and AReaL (arXiv 2505.24298); k3: Schulman 2020. The KL term is not
    importance-weighted, as in GRPO.

    Args:
        current: log-probabilities [T] with gradient; proximal, behaviour, reference: [T] without.
        advantages: [T], a caption's advantage on each of its tokens.
        weights: [T], from `token_weights`; 0 takes a token out.
    """
    proximal = proximal.detach()
    importance = torch.exp(proximal - behaviour)
    if correction.importance_max > 0:
        importance = importance.clamp(max=correction.importance_max)
    ratio = torch.exp(current - proximal)
    free = ratio * advantages
    bound = ratio.clamp(1.0 - correction.clip_low, 1.0 + correction.clip_high) * advantages
    per_token = -importance * torch.minimum(free, bound)
    kl = torch.zeros_like(current)
    if reference is not None:
        away = reference - current
        kl = torch.exp(away) - away - 1.0
        per_token = per_token + kl_coef * kl
    stats = TokenStats(
        ratio=ratio.detach(),
        importance=importance,
        clipped=(bound < free).detach().to(current.dtype),
        gap=(current - behaviour).detach(),
        kl=kl.detach(),
    )
    return (weights * per_token).sum(), stats


def summarise(stats: TokenStats, entropy: Tensor, staleness: Tensor) -> dict[str, float]:
    """Metrics of one update from the tokens of all its captions (all [T], any float type, T > 0).

    `effective_samples` is `(sum w)^2 / (T * sum w^2)` of the whole weight `importance * ratio`: 1 on policy,
    towards 0 when few tokens carry the update. The `logprob_gap` is learner minus engine; over tokens of
    staleness 0 (`_fresh`) it is the mismatch of the two programs and nothing else; NaN without such tokens.
    """
    whole = (stats.importance * stats.ratio).double()
    gap = stats.gap.double().abs()
    fresh = gap[staleness == 0]
    return {
        "clip_fraction": stats.clipped.mean().item(),
        "ratio_mean": stats.ratio.mean().item(),
        "ratio_max": stats.ratio.max().item(),
        "importance_mean": stats.importance.mean().item(),
        "importance_max": stats.importance.max().item(),
        "effective_samples": (whole.sum().square() / (len(whole) * whole.square().sum())).item(),
        "entropy": entropy.mean().item(),
        "kl": stats.kl.mean().item(),
        "logprob_gap_mean": gap.mean().item(),
        "logprob_gap_p99": _quantile(gap, 0.99),
        "logprob_gap_max": gap.max().item(),
        "logprob_gap_fresh_mean": fresh.mean().item() if len(fresh) else math.nan,
        "logprob_gap_fresh_max": fresh.max().item() if len(fresh) else math.nan,
        "token_staleness_mean": staleness.double().mean().item(),
        "token_staleness_max": staleness.double().max().item(),
    }


def _quantile(values: Tensor, share: float) -> float:
    """Nearest-rank quantile; `torch.quantile` refuses more than 16 M values."""
    rank = min(len(values), max(1, round(share * len(values))))
    return values.kthvalue(rank).values.item()
