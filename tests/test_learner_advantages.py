"""Advantages and the learning rate against their formulas."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.config import AdvantageConfig, AdvantageKind, LearnerConfig
from caprl_async.learner.advantages import batch_advantages, group_advantages
from caprl_async.learner.engine import learning_rate

rewards = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9).filter(lambda r: max(r) - min(r) > 1e-3)


@given(rewards)
def test_advantages_follow_their_formulas(group: list[float]) -> None:
    tensor = torch.tensor(group, dtype=torch.float64)
    mean = statistics.fmean(group)
    for i, reward in enumerate(group):
        others = [r for j, r in enumerate(group) if j != i]
        expected = {
            AdvantageKind.mean: reward - mean,
            AdvantageKind.rloo: reward - statistics.fmean(others),
            AdvantageKind.mean_std: (reward - mean) / (statistics.stdev(group) + 1e-6),
        }
        for kind, value in expected.items():
            assert group_advantages(tensor, kind)[i].item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("kind", AdvantageKind)
@pytest.mark.parametrize("group", [[0.1] * 3, [0.7], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
def test_a_group_without_difference_teaches_nothing(kind: AdvantageKind, group: list[float]) -> None:
    assert group_advantages(torch.tensor(group), kind).tolist() == [0.0] * len(group)


def test_advantages_take_many_groups_at_once() -> None:
    groups = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.5, 0.5], [0.2, 0.9, 0.1]])
    for kind in AdvantageKind:
        together = group_advantages(groups, kind)
        apart = torch.stack([group_advantages(group, kind) for group in groups])
        torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)


@given(st.lists(rewards, min_size=1, max_size=4), st.sampled_from(AdvantageKind))
def test_over_the_batch_advantages_have_deviation_one(batch: list[list[float]], kind: AdvantageKind) -> None:
    batch = [*batch, [0.5, 0.5]]  # a group without difference does not count
    plain = batch_advantages(batch, AdvantageConfig(kind=kind))
    scale = statistics.stdev([a for group in plain[:-1] for a in group])
    found = batch_advantages(batch, AdvantageConfig(kind=kind, batch_norm=True))
    for before, after in zip(plain, found, strict=True):
        assert after == pytest.approx([a / (scale + 1e-6) for a in before], abs=1e-9)
    assert found[-1] == [0.0, 0.0]


@given(rewards, st.floats(0.01, 3))
def test_clipped_advantages_stay_within_their_bound(group: list[float], bound: float) -> None:
    (plain,) = batch_advantages([group], AdvantageConfig())
    (found,) = batch_advantages([group], AdvantageConfig(clip=bound))
    assert found == [min(max(a, -bound), bound) for a in plain]


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 20, config) for step in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    assert rates[12] == pytest.approx(0.55)
    assert rates[20:] == pytest.approx([0.1] * 5)
    assert learning_rate(0, 10, LearnerConfig(lr=1.0, warmup_steps=0)) == 1.0
