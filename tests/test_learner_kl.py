"""KL in the reward against the same batch with its rewards lowered by hand, from plain transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.multiprocessing as mp
from learner_kit import (
    images,
    join_alone,
    make_batch,
    near_policy,
    plain_logprobs,
    plain_reference,
    tiny_config,
    tiny_processor,
)

from caprl_async.config import KLConfig, KLEstimator, KLPlace
from caprl_async.types import TrainBatch

COEF = 1.0


def by_hand(policy: float, reference: float, kind: KLEstimator) -> float:
    """Schulman's estimators, with the ratio reference / policy."""
    ratio = math.exp(reference - policy)
    if kind is KLEstimator.k1:
        return -math.log(ratio)
    return math.log(ratio) ** 2 / 2 if kind is KLEstimator.k2 else ratio - 1 - math.log(ratio)


def lowered(
    batch: TrainBatch, references: list[list[list[float]]], kind: KLEstimator
) -> tuple[TrainBatch, list[float]]:
    """The batch with `COEF * sum_t KL_t` off each reward, and the KL of every token."""
    groups, every = [], []
    for scored, of_group in zip(batch.groups, references, strict=True):
        rewards = []
        for parts, caption, reference in zip(scored.rewards, scored.group.captions, of_group, strict=True):
            kl = [by_hand(b, r, kind) for b, r in zip(caption.logprobs, reference, strict=True)]
            assert parts.total is not None
            rewards.append(msgspec.structs.replace(parts, total=parts.total - COEF * sum(kl)))
            every += kl
        groups.append(msgspec.structs.replace(scored, rewards=tuple(rewards)))
    return msgspec.structs.replace(batch, groups=tuple(groups)), every


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of the entries."""
    far = torch.cat([(one[name] - other[name]).abs().flatten() > 1e-5 for name in one])
    return far.double().mean().item()


def compare(_: int, folder: str) -> None:
    join_alone()
    from caprl_async.learner.trainer import Trainer

    processor = tiny_processor()
    plain = plain_reference(tiny_config())
    batch = near_policy(make_batch(processor, images(Path(folder), 2), 3, lengths=(2, 12)), plain)
    references = [plain_logprobs(plain, scored) for scored in batch.groups]

    def trained(on: TrainBatch, **learner: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        trainer = Trainer(tiny_config(warmup_steps=1, **learner), processor, 0, 1)
        metrics = trainer.train(on)
        tensors = trainer.engine.gather(trainer.hf)
        assert tensors is not None
        return metrics, tensors

    _, plainly = trained(batch)
    for kind in KLEstimator:
        kl = KLConfig(coef=COEF, estimator=kind, place=KLPlace.reward)
        ours, weights = trained(batch, kl=kl)
        penalised, tokens = lowered(batch, references, kind)
        theirs, expected = trained(penalised)
        assert ours["kl"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)
        captions = sum(len(scored.group.captions) for scored in batch.groups)
        assert ours["kl_penalty_mean"] == pytest.approx(COEF * sum(tokens) / captions, rel=1e-4)
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6)
        # Adam divides by the gradient's size: where that is only rounding error, the first step differs.
        assert differing(weights, expected) < 0.01
        assert differing(weights, plainly) > 0.05
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_kl_in_the_reward_is_a_reward_that_is_lower_by_it(tmp_path: Path) -> None:
    mp.spawn(compare, (str(tmp_path),), nprocs=1)
