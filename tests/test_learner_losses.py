"""The loss in all its forms against loops in float64, written from the papers' equations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_async.config import (
    Aggregation,
    Beyond,
    CorrectionConfig,
    ImportanceConfig,
    ImportanceLevel,
    KLConfig,
    KLEstimator,
    LearnerConfig,
    Proximal,
    TrustRegion,
    TrustRegionConfig,
)
from caprl_async.learner.corrections import importance_weights, proximal_logprobs
from caprl_async.learner.losses import LossTokens, kl_estimate, policy_loss, token_weights
from caprl_async.learner.statistics import summarise


@dataclass(frozen=True)
class Token:
    current: float
    proximal: float
    behaviour: float
    reference: float
    entropy: float


logprob = st.floats(-4, -0.01)
tokens = st.builds(Token, logprob, logprob, logprob, logprob, st.floats(0, 3))
captions = st.tuples(st.lists(tokens, min_size=1, max_size=5), st.floats(-3, 3))
batches = st.lists(captions, min_size=1, max_size=4)
Batch = list[tuple[list[Token], float]]

importances = st.builds(
    ImportanceConfig,
    level=st.sampled_from(ImportanceLevel),
    beyond=st.sampled_from(Beyond),
    low=st.sampled_from([0.0, 0.5]),
    high=st.sampled_from([0.0, 2.0]),
)
regions = st.builds(
    TrustRegionConfig,
    kind=st.sampled_from([k for k in TrustRegion if k is not TrustRegion.ppo]),
    clip_low=st.sampled_from([0.1, 0.2, 1.0]),
    clip_high=st.sampled_from([0.2, 0.3]),
) | st.builds(TrustRegionConfig, dual_clip=st.sampled_from([0.0, 3.0]), clip_high=st.sampled_from([0.2, 0.3]))
kls = st.builds(KLConfig, coef=st.sampled_from([0.0, 0.1]), estimator=st.sampled_from(KLEstimator))


# ---------------------------------------------------------------- the references


def reference_importance(caption: list[Token], t: int, config: ImportanceConfig) -> float:
    """min(pi_prox / pi_behave, C), or 0 outside a band; per token, or the product over the caption."""
    if config.level is ImportanceLevel.none:
        return 1.0
    taken = caption if config.level is ImportanceLevel.sequence else [caption[t]]
    weight = 1.0
    for token in taken:
        weight *= math.exp(token.proximal) / math.exp(token.behaviour)
    high = config.high or math.inf
    if config.low <= weight <= high:
        return weight
    if config.beyond is Beyond.mask:
        return 0.0
    return config.low if weight < config.low else high


def reference_gain(
    caption: list[Token], t: int, advantage: float, config: TrustRegionConfig
) -> tuple[float, dict[int, float]]:
    """(gain of token t, d gain / d current log-probability of each token that it depends on)."""
    token = caption[t]
    n = len(caption)
    if config.kind is TrustRegion.reinforce:
        return advantage * token.current, {t: advantage}
    if config.kind is TrustRegion.gspo:
        likelihood = math.prod(math.exp(x.current) / math.exp(x.proximal) for x in caption)
        ratio = likelihood ** (1 / n)
        slopes = dict.fromkeys(range(n), ratio / n)
    else:
        ratio = math.exp(token.current) / math.exp(token.proximal)
        slopes = {t: ratio}
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clipped = low if ratio < low else min(ratio, high)
    if config.kind is TrustRegion.cispo:
        return clipped * advantage * token.current, {t: clipped * advantage}
    gain, alive = ratio * advantage, True
    if clipped * advantage < gain:
        gain, alive = clipped * advantage, False
    if config.dual_clip and advantage < 0 and gain < config.dual_clip * advantage:
        gain, alive = config.dual_clip * advantage, False
    return gain, {i: slope * advantage for i, slope in slopes.items()} if alive else {}


def reference_kl(policy: float, reference: float, kind: KLEstimator) -> tuple[float, float]:
    """Schulman's estimators of KL(policy || reference), with q / p = reference / policy; and the slope."""
    log_ratio = reference - policy
    if kind is KLEstimator.k1:
        return -log_ratio, 1.0
    if kind is KLEstimator.k2:
        return 0.5 * log_ratio**2, -log_ratio
    return math.exp(log_ratio) - 1 - log_ratio, 1 - math.exp(log_ratio)


def reference_weight(batch: Batch, caption: list[Token], kind: Aggregation, length: int) -> float:
    if kind is Aggregation.token_mean:
        return 1 / sum(len(tokens) for tokens, _ in batch)
    if kind is Aggregation.sequence_mean:
        return 1 / len(batch) / len(caption)
    return 1 / len(batch) / length


def reference_loss(batch: Batch, config: LearnerConfig) -> tuple[float, list[float]]:
    loss, gradient = 0.0, []
    for caption, advantage in batch:
        slopes = [0.0] * len(caption)
        weight = reference_weight(batch, caption, config.aggregation, config.sum_length)
        for t, token in enumerate(caption):
            importance = reference_importance(caption, t, config.correction.importance)
            gain, slope = reference_gain(caption, t, advantage, config.correction.trust_region)
            loss -= weight * importance * gain
            for i, value in slope.items():
                slopes[i] -= weight * importance * value
            if config.kl.coef:
                kl, kl_slope = reference_kl(token.current, token.reference, config.kl.estimator)
                loss += weight * config.kl.coef * kl
                slopes[t] += weight * config.kl.coef * kl_slope
            loss -= weight * config.entropy_coef * token.entropy
        gradient += slopes
    return loss, gradient


# ---------------------------------------------------------------- what is tested


def computed(batch: Batch, config: LearnerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, gradient of the log-probabilities, of the entropies)."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(t, name) for c, _ in batch for t in c], dtype=torch.float64)

    lengths = [len(caption) for caption, _ in batch]
    sizes = torch.tensor(lengths)
    weights = torch.tensor(token_weights(lengths, config.aggregation, config.sum_length), dtype=torch.float64)
    advantages = torch.tensor([advantage for _, advantage in batch], dtype=torch.float64)
    current, entropy = column("current").requires_grad_(), column("entropy").requires_grad_()
    given = LossTokens(
        behaviour=column("behaviour"),
        advantages=advantages.repeat_interleave(sizes),
        weights=weights.repeat_interleave(sizes),
        rows=torch.arange(len(batch)).repeat_interleave(sizes),
        staleness=torch.zeros(sum(lengths), dtype=torch.float64),
    )
    reference = column("reference") if config.kl.coef else None
    loss, _ = policy_loss(current, entropy, column("proximal"), given, config, reference)
    loss.backward()
    assert current.grad is not None
    return loss.detach(), current.grad, torch.zeros(1) if entropy.grad is None else entropy.grad


@settings(max_examples=200)
@given(batches, importances, regions, kls, st.sampled_from(Aggregation), st.sampled_from([0.0, 0.05]))
def test_loss_and_gradient_equal_the_loops(
    batch: Batch,
    importance: ImportanceConfig,
    region: TrustRegionConfig,
    kl: KLConfig,
    aggregation: Aggregation,
    entropy_coef: float,
) -> None:
    config = LearnerConfig(
        correction=CorrectionConfig(importance=importance, trust_region=region),
        kl=kl,
        aggregation=aggregation,
        sum_length=7,
        entropy_coef=entropy_coef,
    )
    loss, gradient = reference_loss(batch, config)
    found, slope, bonus = computed(batch, config)
    assert found.item() == pytest.approx(loss, rel=1e-9, abs=1e-9)
    assert slope.tolist() == pytest.approx(gradient, rel=1e-9, abs=1e-9)
    if entropy_coef:
        weights = [reference_weight(batch, c, aggregation, 7) for c, _ in batch for _ in c]
        assert bonus.tolist() == pytest.approx([-entropy_coef * weight for weight in weights])


@given(batches, st.sampled_from(Aggregation))
def test_at_equal_policies_every_correction_is_the_same_gradient(
    batch: Batch, aggregation: Aggregation
) -> None:
    same: Batch = [([Token(t.current, t.current, t.current, 0.0, 0.0) for t in c], a) for c, a in batch]
    gradients = []
    for kind, level, beyond in itertools.product(TrustRegion, ImportanceLevel, Beyond):
        correction = CorrectionConfig(
            importance=ImportanceConfig(level=level, beyond=beyond, low=0.5),
            trust_region=TrustRegionConfig(kind=kind, clip_low=3e-4, clip_high=4e-4),
        )
        config = LearnerConfig(correction=correction, aggregation=aggregation, sum_length=5)
        gradients.append(computed(same, config)[1])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)


@given(batches, importances)
def test_weights_stay_within_their_bounds(batch: Batch, config: ImportanceConfig) -> None:
    proximal = torch.tensor([t.proximal for c, _ in batch for t in c], dtype=torch.float64)
    behaviour = torch.tensor([t.behaviour for c, _ in batch for t in c], dtype=torch.float64)
    rows = torch.arange(len(batch)).repeat_interleave(torch.tensor([len(c) for c, _ in batch]))
    weights, raw, bounded = importance_weights(proximal, behaviour, rows, config)
    high = config.high or math.inf
    if config.level is not ImportanceLevel.none:
        inside = (weights >= config.low) & (weights <= high)
        masked = (weights == 0) & (bounded == 1) if config.beyond is Beyond.mask else torch.zeros_like(inside)
        assert bool((inside | masked).all())
        assert torch.equal(weights[bounded == 0], raw[bounded == 0])
    assert set(bounded.tolist()) <= {0.0, 1.0}


@given(st.lists(st.tuples(logprob, logprob, st.integers(0, 8)), min_size=1, max_size=9))
def test_the_interpolated_policy_lies_between_by_the_age_of_each_token(
    given_tokens: list[tuple[float, float, int]],
) -> None:
    current, behaviour, staleness = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*given_tokens, strict=True)
    )
    found = proximal_logprobs(Proximal.interpolate, current, None, behaviour, staleness)
    for (now, then, age), value in zip(given_tokens, found.tolist(), strict=True):
        # Version v - age sampled, v + 1 is being made, v is the proximal one.
        share = (0 - -age) / (1 - -age)
        assert value == pytest.approx(then + share * (now - then), abs=1e-12)
        assert age > 0 or value == then


def test_which_policy_is_proximal() -> None:
    current, anchor, behaviour = (torch.tensor([x], requires_grad=True) for x in (-1.0, -2.0, -3.0))
    age = torch.tensor([1.0])
    assert proximal_logprobs(Proximal.behaviour, current, anchor, behaviour, age) is behaviour
    assert proximal_logprobs(Proximal.recompute, current, anchor, behaviour, age) is anchor
    first = proximal_logprobs(Proximal.recompute, current, None, behaviour, age)
    assert first.item() == -1.0
    assert not first.requires_grad


def test_kl_estimators_are_nonnegative_or_unbiased() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    other = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = (policy * (policy / other).log()).sum().item()
    for kind in KLEstimator:
        terms = kl_estimate(policy.log(), other.log(), kind)
        if kind is not KLEstimator.k2:
            assert (policy * terms).sum().item() == pytest.approx(exact)
        if kind is not KLEstimator.k1:
            assert bool((terms >= 0).all())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_token_weights_sum_to_one_over_a_whole_update(lengths: list[int]) -> None:
    for kind in (Aggregation.token_mean, Aggregation.sequence_mean):
        weights = token_weights(lengths, kind, 1)
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1)
    per_caption = [
        w * n for w, n in zip(token_weights(lengths, Aggregation.sequence_mean, 1), lengths, strict=True)
    ]
    assert per_caption == pytest.approx([1 / len(lengths)] * len(lengths))
    assert set(token_weights(lengths, Aggregation.sequence_sum, 40)) == {1 / (len(lengths) * 40)}


def test_statistics_of_a_small_case() -> None:
    behaviour = torch.log(torch.tensor([0.5, 0.25, 0.1]))
    current = torch.log(torch.tensor([0.5, 0.5, 0.8]))
    given_tokens = LossTokens(
        behaviour, torch.ones(3), torch.ones(3) / 3, torch.tensor([0, 0, 1]), torch.tensor([0.0, 1.0, 2.0])
    )
    _, stats = policy_loss(current, torch.tensor([1.0, 2.0, 3.0]), current, given_tokens, LearnerConfig())
    found = summarise(stats)
    assert found["importance_mean"] == pytest.approx((1 + 2 + 2) / 3)
    assert found["importance_bounded"] == pytest.approx(1 / 3)
    assert found["importance_raw_max"] == pytest.approx(8)
    assert found["effective_samples"] == pytest.approx(25 / (3 * 9))
    assert found["effective_samples_raw"] == pytest.approx(121 / (3 * 69))
    assert found["ratio_max"] == pytest.approx(1)
    assert found["logprob_gap_max"] == pytest.approx(math.log(8))
    assert found["logprob_gap_fresh_max"] == pytest.approx(0)
    assert found["kl_behaviour"] == pytest.approx((1 - math.log(2) + 7 - math.log(8)) / 3)
    assert found["entropy"] == pytest.approx(2)
    assert found["token_staleness_mean"] == pytest.approx(1)
