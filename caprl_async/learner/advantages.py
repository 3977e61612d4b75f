"""Group-relative advantages: how much better a caption did than the other captions of its image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caprl_async.config import AdvantageConfig, AdvantageKind

STD_FLOOR = 1e-6
"""Added to standard deviations, so that a spread of rounding errors is not blown up."""


def group_advantages(rewards: Tensor, kind: AdvantageKind) -> Tensor:
    """Advantages [..., n] of rewards [..., n]; the last dimension is one group. Computed in float64.

    With m the mean of the group:
    - mean_std: `(r - m) / (std + 1e-6)`, std with n - 1 in the denominator (GRPO, arXiv 2402.03300 eq. 3).
    - mean: `r - m` (Dr. GRPO, arXiv 2503.20783).
    - rloo: `r_i - mean of the others = n / (n - 1) * (r_i - m)` (RLOO, arXiv 2402.14740).

    A group of one has nothing to compare with and gets 0; so does a group of equal rewards.
    """
    rewards = rewards.to(torch.float64)
    n = rewards.shape[-1]
    if n == 1:
        return torch.zeros_like(rewards)
    # Not the rounding error of the mean, blown up by a tiny std.
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(equal, 0.0)
    if kind is AdvantageKind.mean:
        return centred
    if kind is AdvantageKind.rloo:
        return centred * (n / (n - 1))
    return centred / (rewards.std(-1, keepdim=True) + STD_FLOOR)


def batch_advantages(
    groups: Sequence[Sequence[Sequence[float]]], config: AdvantageConfig, weights: Sequence[float]
) -> list[list[float]]:
    """Advantages of all captions of a batch, group by group; all 0 in a group of equal rewards.

    The advantage of each term is taken within the group and weighted, and they are added (GDPO, arXiv
    2601.05242); a single term is plain GRPO. With `batch_norm` they are divided by `std + 1e-6` over the
    captions of the groups that have a difference (their mean is 0 already; REINFORCE++, arXiv 2501.03262);
    then cut to +-`clip`.

    Args:
        groups: [group][caption][term].
        weights: [term].
    """
    scales = torch.tensor(weights, dtype=torch.float64)
    found = [
        (scales[:, None] * group_advantages(torch.tensor(group, dtype=torch.float64).T, config.kind)).sum(0)
        for group in groups
    ]
    if config.batch_norm and (differing := [group for group in found if group.any()]):
        scale = torch.cat(differing).std() + STD_FLOOR
        found = [group / scale for group in found]
    if config.clip > 0:
        found = [group.clamp(-config.clip, config.clip) for group in found]
    return [group.tolist() for group in found]
