"""The loss of an update on caption tokens: corrected policy gradient, KL, entropy; see `corrections`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caprl_async.config import Aggregation, KLEstimator, LearnerConfig
from caprl_async.learner.corrections import importance_weights, trust_region


def token_weights(lengths: Sequence[int], aggregation: Aggregation, sum_length: int) -> list[float]:
    """What one token of each caption weighs in the loss of an update; `lengths` are of *all* its captions.

    - token_mean: every token `1 / sum of lengths` (DAPO, arXiv 2503.14476).
    - sequence_mean: a token of caption i `1 / (captions * length_i)` (GRPO, arXiv 2402.03300 eq. 3).
    - sequence_sum: every token `1 / (captions * sum_length)` (Dr. GRPO, arXiv 2503.20783).

    They depend on the whole update alone, so that micro-batches and ranks change no gradient.
    """
    if aggregation is Aggregation.token_mean:
        total = sum(lengths)
        return [1.0 / total] * len(lengths)
    if aggregation is Aggregation.sequence_sum:
        return [1.0 / (len(lengths) * sum_length)] * len(lengths)
    return [1.0 / (len(lengths) * length) for length in lengths]


def kl_estimate(policy: Tensor, reference: Tensor, kind: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens of the policy, [T] (Schulman 2020).

    With `d = policy - reference`: k1 `d`, k2 `d^2 / 2`, k3 `exp(-d) - 1 + d`.
    """
    away = policy - reference
    if kind is KLEstimator.k1:
        return away
    if kind is KLEstimator.k2:
        return away.square() / 2
    return torch.exp(-away) - 1.0 + away


@dataclass(frozen=True)
class LossTokens:
    """What the loss needs to know of T caption tokens; all [T]."""

    behaviour: Tensor  # log-probabilities when sampled
    advantages: Tensor
    weights: Tensor  # from `token_weights`; 0 takes a token out
    rows: Tensor  # number of the caption, int
    staleness: Tensor  # learner steps


@dataclass(frozen=True)
class TokenStats:
    """What happened to each token in one loss call; all [T], detached."""

    ratio: Tensor  # current / proximal, per token or caption
    importance: Tensor  # proximal / behaviour, after its bounds
    raw: Tensor  # the same before its bounds
    bounded: Tensor  # 1 where a bound changed the importance weight
    clipped: Tensor  # 1 where the trust region held the token
    gap: Tensor  # current - behaviour log-probability
    kl: Tensor  # estimate of the KL to the reference; NaN without one
    staleness: Tensor
    entropy: Tensor


def policy_loss(
    current: Tensor,
    entropy: Tensor,
    proximal: Tensor,
    tokens: LossTokens,
    config: LearnerConfig,
    reference: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """Loss of the tokens at hand; the losses of all micro-batches of all ranks add up to the update's loss.

        loss = sum_t weight_t * (-w_t * gain_t + kl.coef * KL_t - entropy_coef * H_t)

    `w` and `gain` are those of `corrections`. The KL term is not importance-weighted, as in GRPO.

    Args:
        current, entropy: log-probabilities and entropies [T] with gradient.
        proximal, reference: log-probabilities [T] without; no reference: no KL term (with `kl.place: reward`
            it is in the advantages already).
    """
    correction = config.correction
    importance, raw, bounded = importance_weights(
        proximal.detach(), tokens.behaviour, tokens.rows, correction.importance
    )
    gain, ratio, clipped = trust_region(
        current, proximal.detach(), tokens.advantages, tokens.rows, correction.trust_region
    )
    per_token = -importance * gain
    kl = torch.full_like(current, torch.nan)
    if reference is not None:
        kl = kl_estimate(current, reference, config.kl.estimator)
        per_token = per_token + config.kl.coef * kl
    if config.entropy_coef:
        per_token = per_token - config.entropy_coef * entropy
    stats = TokenStats(
        ratio=ratio,
        importance=importance,
        raw=raw,
        bounded=bounded,
        clipped=clipped,
        gap=(current - tokens.behaviour).detach(),
        kl=kl.detach(),
        staleness=tokens.staleness,
        entropy=entropy.detach(),
    )
    return (tokens.weights * per_token).sum(), stats
