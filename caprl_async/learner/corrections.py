"""Off-policy correction on tokens: the proximal policy, importance weights to it, trust regions around it.

Three policies meet: `behaviour` sampled the tokens, `proximal` is the one that the update stays close to,
`current` is being trained. All vectors are flat over caption tokens, [T], log-probabilities in nats; `rows`
[T] is the number of each token's caption within the micro-batch, which holds captions whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caprl_async.config import (
    Beyond,
    ImportanceConfig,
    ImportanceLevel,
    Proximal,
    TrustRegion,
    TrustRegionConfig,
)


def proximal_logprobs(
    kind: Proximal, current: Tensor, anchor: Tensor | None, behaviour: Tensor, staleness: Tensor
) -> Tensor:
    """Log-probabilities [T] of the proximal policy, without gradient.

    - behaviour: the sampling policy itself (PPO, arXiv 1707.06347).
    - recompute: `anchor`, the learner's weights before the batch's first update; None while these are the
      current ones (decoupled PPO, arXiv 2110.00641; AReaL, arXiv 2505.24298).
    - interpolate: `b + s / (s + 1) * (current - b)` for a token that is s steps old: the update leads from
      the learner's version v to v + 1, and v lies s / (s + 1) of the way from v - s to v + 1. It takes no
      pass of its own and uses each token's own version (AReaL's log-linear approximation).
    """
    if kind is Proximal.behaviour:
        return behaviour
    if kind is Proximal.interpolate:
        return behaviour + staleness / (staleness + 1) * (current.detach() - behaviour)
    return current.detach() if anchor is None else anchor


def importance_weights(
    proximal: Tensor, behaviour: Tensor, rows: Tensor, config: ImportanceConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(w [T], w before its bounds [T], 1 where a bound changed it [T]), without gradient.

    token: `w_t = exp(proximal_t - behaviour_t)`; sequence: every token of a caption has its product, which
    stays a number however long the caption is (at most e^80). Beyond the bounds it is truncated (TIS:
    `min(w, high)`; IMPALA, arXiv 1802.01561) or 0 (IcePop).
    """
    if config.level is ImportanceLevel.none:
        one = torch.ones_like(proximal)
        return one, one, torch.zeros_like(proximal)
    away = proximal - behaviour
    if config.level is ImportanceLevel.sequence:
        away = _row_sums(away, rows).clamp(max=80.0)[rows]
    raw = away.exp()
    high = config.high if config.high > 0 else torch.inf
    outside = (raw < config.low) | (raw > high)
    if config.beyond is Beyond.mask:
        return raw.masked_fill(outside, 0.0), raw, outside.to(raw.dtype)
    return raw.clamp(config.low, high), raw, outside.to(raw.dtype)


def trust_region(
    current: Tensor, proximal: Tensor, advantages: Tensor, rows: Tensor, config: TrustRegionConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(gain [T] with gradient, r [T], 1 where a bound holds it [T]); the loss is minus the gain.

    With `r = exp(current - proximal)`, `c = clip(r, 1 - low, 1 + high)` and sg() without gradient:

    - ppo: `min(r A, c A)` (arXiv 1707.06347 eq. 7); with `dual_clip` d and A < 0 no less than `d A`
      (arXiv 1912.09729).
    - gspo: the same with one `r = exp(mean_t(current_t - proximal_t))` per caption (arXiv 2507.18071
      eq. 5, 7).
    - cispo: `sg(c) A current` (arXiv 2506.13585 eq. 4): every token keeps a gradient.
    - reinforce: `A current`: r is fixed at 1.

    Held by a bound means no gradient, but for cispo, where it means a smaller or larger one.
    """
    away = current - proximal
    if config.kind is TrustRegion.gspo:
        lengths = _row_sums(torch.ones_like(away), rows)
        away = (_row_sums(away, rows) / lengths)[rows]
    ratio = away.exp()
    if config.kind is TrustRegion.reinforce:
        return advantages * current, ratio.detach(), torch.zeros_like(ratio)
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.kind is TrustRegion.cispo:
        return bounded.detach() * advantages * current, ratio.detach(), (bounded != ratio).to(ratio.dtype)
    free, bound = ratio * advantages, bounded * advantages
    gain = torch.minimum(free, bound)
    gone = bound < free
    if config.dual_clip > 0:
        floor = config.dual_clip * advantages
        deep = (advantages < 0) & (gain < floor)
        gain, gone = torch.where(deep, floor, gain), gone | deep
    return gain, ratio.detach(), gone.to(ratio.dtype)


def _row_sums(values: Tensor, rows: Tensor) -> Tensor:
    """Sum over each caption's tokens, [captions]."""
    count = int(rows.max()) + 1 if len(rows) else 0
    return values.new_zeros(count).index_add(0, rows, values)
