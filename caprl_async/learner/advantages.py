"""Group-relative advantages: how much better a caption did than the other captions of its image."""

from __future__ import annotations

import torch
from torch import Tensor

from caprl_async.config import AdvantageKind

STD_FLOOR = 1e-6
"""Added to the standard deviation; far below any spread that the queue lets through as a group."""


def group_advantages(rewards: Tensor, kind: AdvantageKind) -> Tensor:
    """Advantages [..., n] of rewards [..., n]; the last dimension is one group. Computed in float64.

    With m the mean of the group:
    - mean_std: `(r - m) / (std + 1e-6)`, std with n - 1 in the denominator (GRPO, arXiv 2402.03300).
    - mean: `r - m` (Dr. GRPO, arXiv 2503.20783).
    - rloo: `r_i - mean of the others = n / (n - 1) * (r_i - m)` (RLOO, arXiv 2402.14740).

    A group of one has nothing to compare with and gets 0; so does a group of equal rewards.
    """
    rewards = rewards.to(torch.float64)
    n = rewards.shape[-1]
    if n == 1:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(-1, keepdim=True)
    if bool((rewards == rewards[..., :1]).all()):
        return torch.zeros_like(rewards)  # not the rounding error of the mean, blown up by a tiny std
    if kind is AdvantageKind.mean:
        return centred
    if kind is AdvantageKind.rloo:
        return centred * (n / (n - 1))
    return centred / (rewards.std(-1, keepdim=True) + STD_FLOOR)
