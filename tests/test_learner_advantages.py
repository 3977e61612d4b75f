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
    terms = [[(reward,) for reward in group] for group in batch]
    plain = batch_advantages(terms, AdvantageConfig(kind=kind), (1.0,))
    scale = statistics.stdev([a for group in plain[:-1] for a in group])
    found = batch_advantages(terms, AdvantageConfig(kind=kind, batch_norm=True), (1.0,))
    for before, after in zip(plain, found, strict=True):
        assert after == pytest.approx([a / (scale + 1e-6) for a in before], abs=1e-9)
    assert found[-1] == [0.0, 0.0]


@given(rewards, st.floats(0.01, 3))
def test_clipped_advantages_stay_within_their_bound(group: list[float], bound: float) -> None:
    terms = [[(reward,) for reward in group]]
    (plain,) = batch_advantages(terms, AdvantageConfig(), (1.0,))
    (found,) = batch_advantages(terms, AdvantageConfig(clip=bound), (1.0,))
    assert found == [min(max(a, -bound), bound) for a in plain]


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])] * 3), min_size=2, max_size=6))
def test_terms_are_normalised_each_on_its_own_then_weighted(group: list[tuple[float, ...]]) -> None:
    weights = (1.0, 0.2, -0.5)
    (found,) = batch_advantages([group], AdvantageConfig(), weights)
    for caption, advantage in zip(group, found, strict=True):
        expected = 0.0
        for i, weight in enumerate(weights):
            column = [row[i] for row in group]
            spread = statistics.stdev(column)
            if len(set(column)) > 1:
                expected += weight * (caption[i] - statistics.fmean(column)) / (spread + 1e-6)
        assert advantage == pytest.approx(expected, abs=1e-6)


def test_a_term_of_small_scale_counts_as_much_as_its_weight_says() -> None:
    """Added first and normalised then, a term that varies little would hardly be heard."""
    group = [(0.0, 0.010), (1.0, 0.011), (0.0, 0.011), (1.0, 0.010)]
    (apart,) = batch_advantages([group], AdvantageConfig(), (1.0, 1.0))
    (added,) = batch_advantages([[(a + b,) for a, b in group]], AdvantageConfig(), (1.0,))
    assert apart[2:] == pytest.approx([0.0, 0.0], abs=0.01)
    assert apart[1] == pytest.approx(-apart[0]) == pytest.approx(2 * added[1], rel=0.02)
    assert added[3] == pytest.approx(added[1], abs=0.01)


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 20, config) for step in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    assert rates[12] == pytest.approx(0.55)
    assert rates[20:] == pytest.approx([0.1] * 5)
    assert learning_rate(0, 10, LearnerConfig(lr=1.0, warmup_steps=0)) == 1.0
