"""Advantages, the policy loss and its statistics, against loops in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_async.config import AdvantageKind, Aggregation, CorrectionConfig, LearnerConfig
from caprl_async.learner.advantages import group_advantages
from caprl_async.learner.engine import learning_rate
from caprl_async.learner.losses import policy_loss, summarise, token_weights

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


logprob = st.floats(-6, -0.01)
token = st.tuples(logprob, logprob, logprob, logprob, st.floats(-3, 3), st.floats(0.01, 1))


@settings(max_examples=60)
@given(st.lists(token, min_size=1, max_size=12), st.sampled_from([0.0, 2.0]), st.sampled_from([0.0, 0.1]))
def test_loss_and_gradient_equal_a_loop(tokens: list[tuple[float, ...]], cap: float, kl_coef: float) -> None:
    correction = CorrectionConfig(importance_max=cap, clip_low=0.2, clip_high=0.28)
    loss_loop, grad_loop, clipped = 0.0, [], []
    for current, proximal, behaviour, reference, advantage, weight in tokens:
        importance = math.exp(proximal - behaviour)
        importance = min(importance, cap) if cap else importance
        ratio = math.exp(current - proximal)
        bound = min(max(ratio, 0.8), 1.28)
        away = reference - current
        gain = min(ratio * advantage, bound * advantage)
        loss_loop += weight * (-importance * gain + kl_coef * (math.exp(away) - away - 1))
        is_clipped = bound * advantage < ratio * advantage
        clipped.append(float(is_clipped))
        slope = 0.0 if is_clipped else ratio * advantage
        grad_loop.append(weight * (-importance * slope + kl_coef * (1 - math.exp(away))))
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)]
    current = columns[0].requires_grad_()
    loss, stats = policy_loss(
        current,
        columns[1],
        columns[2],
        columns[4],
        columns[5],
        correction,
        reference=columns[3] if kl_coef else None,
        kl_coef=kl_coef,
    )
    loss.backward()
    assert loss.item() == pytest.approx(loss_loop, rel=1e-9, abs=1e-9)
    assert current.grad is not None
    assert current.grad.tolist() == pytest.approx(grad_loop, rel=1e-9, abs=1e-9)
    assert stats.clipped.tolist() == clipped


def test_the_proximal_policy_gets_no_gradient() -> None:
    current = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = policy_loss(
        current, current, torch.tensor([-1.5, -1.5]), torch.ones(2), torch.ones(2), CorrectionConfig()
    )
    loss.backward()
    assert current.grad is not None
    assert current.grad.tolist() == pytest.approx([-math.exp(0.5), -math.exp(-0.5)])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_token_weights_sum_to_one_over_a_whole_update(lengths: list[int]) -> None:
    for kind in Aggregation:
        weights = token_weights(lengths, kind)
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1)
    assert len(set(token_weights(lengths, Aggregation.token_mean))) == 1
    per_caption = [
        w * n for w, n in zip(token_weights(lengths, Aggregation.sequence_mean), lengths, strict=True)
    ]
    assert per_caption == pytest.approx([1 / len(lengths)] * len(lengths))


def test_statistics_of_a_small_case() -> None:
    behaviour = torch.log(torch.tensor([0.5, 0.25, 0.1]))
    current = torch.log(torch.tensor([0.5, 0.5, 0.8]))
    _, stats = policy_loss(
        current, current, behaviour, torch.ones(3), torch.ones(3) / 3, CorrectionConfig(importance_max=2.0)
    )
    found = summarise(stats, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert found["importance_mean"] == pytest.approx((1 + 2 + 2) / 3)
    assert found["effective_samples"] == pytest.approx(25 / (3 * 9))
    assert found["ratio_max"] == pytest.approx(1)
    assert found["logprob_gap_max"] == pytest.approx(math.log(8))
    assert found["logprob_gap_fresh_max"] == pytest.approx(0)
    assert found["entropy"] == pytest.approx(2)
    assert found["token_staleness_mean"] == pytest.approx(1)


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 20, config) for step in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    assert rates[12] == pytest.approx(0.55)
    assert rates[20:] == pytest.approx([0.1] * 5)
    assert learning_rate(0, 10, LearnerConfig(lr=1.0, warmup_steps=0)) == 1.0
