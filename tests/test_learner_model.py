"""The learner's log-probabilities and gradients against plain transformers, in float64 on the tiny policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_kit import POLICY, images, make_batch, tiny_processor

from caprl_async.config import (
    AdvantageConfig,
    Aggregation,
    ImportanceLevel,
    KLConfig,
    LearnerConfig,
    Prefix,
    RewardConfig,
    TrustRegion,
)
from caprl_async.data.processor import PolicyProcessor
from caprl_async.learner.batch import (
    BadBatch,
    TrainSequence,
    make_sequences,
    split_updates,
    with_advantages,
)
from caprl_async.learner.losses import policy_loss
from caprl_async.learner.model import BadModel, PolicyModel, collator, load_policy, prompt_positions
from caprl_async.learner.pixels import PixelCache, PixelsDiffer
from caprl_async.learner.plan import Captions, Costs, make_plan
from caprl_async.learner.prefix import ATTENTION
from caprl_async.learner.tensors import MicroTensors

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def processor() -> PolicyProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def sequences(processor: PolicyProcessor, tmp_path_factory: pytest.TempPathFactory) -> list[TrainSequence]:
    refs = images(tmp_path_factory.mktemp("images"), 3)
    batch = make_batch(processor, refs, 3, lengths=(2, 12))
    made = with_advantages(make_sequences(batch), AdvantageConfig(), RewardConfig())
    return split_updates(made, 1, Aggregation.sequence_mean)[0]


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_policy(POLICY, "float32").double().eval()


@pytest.fixture(scope="module", params=list(Prefix), ids=lambda prefix: prefix.value)
def policy(request: pytest.FixtureRequest, processor: PolicyProcessor) -> PolicyModel:
    hf = load_policy(POLICY, "float32").double().eval()
    return PolicyModel(hf, processor.banned_token_ids, TEMPERATURE, 5, request.param)


def prefix_of(policy: PolicyModel) -> Prefix:
    shared = policy.hf.model.language_model.config._attn_implementation == ATTENTION
    return Prefix.shared if shared else Prefix.repeated


def tensors_of(micro: Captions, policy: PolicyModel, processor: PolicyProcessor) -> MicroTensors:
    pixels = PixelCache(processor)
    make = collator(policy.hf, processor.image_token_id, pixels, prefix_of(policy), torch.float64)
    return make(micro)


def plain_logprobs(
    plain: Any, processor: PolicyProcessor, s: TrainSequence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one caption by transformers' own forward of one unpadded row."""
    ids = torch.tensor([s.prompt + s.caption])
    out = plain(
        input_ids=ids,
        pixel_values=processor.pixels(s.images[0]).pixel_values.double(),
        image_grid_thw=torch.tensor(s.grids),
        mm_token_type_ids=(ids == processor.image_token_id).int(),
    )
    logits = out.logits[0, len(s.prompt) - 1 : -1].clone()
    logits[:, list(processor.banned_token_ids)] = -torch.inf
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
    return logprobs[range(len(s.caption)), list(s.caption)], entropy


def test_log_probabilities_equal_plain_transformers(
    plain: Any, policy: PolicyModel, processor: PolicyProcessor, sequences: list[TrainSequence]
) -> None:
    with torch.no_grad():
        found, entropy = policy(tensors_of(tuple(sequences), policy, processor))
        expected = [plain_logprobs(plain, processor, s) for s in sequences]
    torch.testing.assert_close(found, torch.cat([e[0] for e in expected]), atol=1e-10, rtol=0)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), atol=1e-9, rtol=0)


def test_exactly_the_caption_tokens_are_scored(
    policy: PolicyModel, processor: PolicyProcessor, sequences: list[TrainSequence]
) -> None:
    tensors = tensors_of(tuple(sequences), policy, processor)
    assert tensors.targets.tolist() == [token for s in sequences for token in s.caption]
    assert tensors.behaviour.tolist() == [b for s in sequences for b in s.behaviour]
    before = tensors.input_ids.flatten()[tensors.sources].tolist()
    assert before == [t for s in sequences for t in (s.prompt[-1], *s.caption[:-1])]


def close(found: torch.Tensor | None, expected: torch.Tensor | None, name: str) -> None:
    """Equal to 1e-6 of the largest entry: transformers' norms work in float32 even in a float64 model."""
    assert found is not None
    assert expected is not None
    scale = expected.abs().max().item()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-6, rtol=0, msg=name)


def gradients(
    policy: PolicyModel, processor: PolicyProcessor, micros: list[Captions], config: LearnerConfig
) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    for micro in micros:
        tensors = tensors_of(micro, policy, processor)
        current, entropy = policy(tensors)
        loss, _ = policy_loss(
            current,
            entropy,
            current.detach() - 0.1,
            tensors.loss_tokens,
            config,
            reference=tensors.behaviour,
        )
        loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def correction(level: str, kind: str) -> LearnerConfig:
    config = LearnerConfig(kl=KLConfig(coef=0.01), entropy_coef=0.02)
    config.correction.importance.level = ImportanceLevel[level]
    config.correction.trust_region.kind = TrustRegion[kind]
    return config


@pytest.mark.parametrize(
    "config", [correction("token", "ppo"), correction("sequence", "gspo")], ids=["per token", "per caption"]
)
def test_micro_batches_and_ranks_do_not_change_the_gradient(
    policy: PolicyModel, processor: PolicyProcessor, sequences: list[TrainSequence], config: LearnerConfig
) -> None:
    whole = gradients(policy, processor, [tuple(sequences)], config)
    assert len(whole) == len(list(policy.parameters()))
    for ranks, budget in [(1, 150), (2, 90), (4, 10_000), (12, 60)]:
        plan = make_plan(sequences, ranks, budget, Costs(prefix_of(policy)))
        cut = gradients(policy, processor, plan.micros, config)
        assert plan.fillers == max(0, ranks - len(sequences))
        for name, gradient in whole.items():
            close(cut[name], gradient, name)


@pytest.mark.parametrize("entropy_share", [0.0, 0.3], ids=["log-probabilities", "and entropies"])
def test_gradient_equals_plain_transformers(
    plain: Any,
    policy: PolicyModel,
    processor: PolicyProcessor,
    sequences: list[TrainSequence],
    entropy_share: float,
) -> None:
    few = sequences[:3]
    policy.zero_grad()
    scored = policy(tensors_of(tuple(few), policy, processor))
    (scored[0].sum() + entropy_share * scored[1].square().sum()).backward()
    plain.zero_grad()
    for s in few:
        logprobs, entropy = plain_logprobs(plain, processor, s)
        (logprobs.sum() + entropy_share * entropy.square().sum()).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in policy.hf.named_parameters():
        close(parameter.grad, expected[name].grad, name)


def test_a_banned_token_has_no_probability(
    policy: PolicyModel, processor: PolicyProcessor, sequences: list[TrainSequence]
) -> None:
    bad = replace(sequences[0], caption=(processor.image_token_id, *sequences[0].caption[1:]))
    tensors = tensors_of((sequences[0],), policy, processor)
    tensors = replace(tensors, targets=torch.tensor(bad.caption))
    with torch.no_grad():
        logprobs, _ = policy(tensors)
    assert logprobs[0].item() == -torch.inf
    assert bool(logprobs[1:].isfinite().all())


def test_other_pixels_than_the_engine_saw_are_refused(
    processor: PolicyProcessor, sequences: list[TrainSequence]
) -> None:
    with pytest.raises(PixelsDiffer, match=r"max_pixels"):
        PixelCache(processor)(sequences[0].images[0], (1, 4, 4))


def test_image_tokens_must_fit_the_grid(
    policy: PolicyModel, processor: PolicyProcessor, sequences: list[TrainSequence]
) -> None:
    positions = prompt_positions(policy.hf, processor.image_token_id)
    with pytest.raises(BadBatch, match="image tokens"):
        positions((*sequences[0].prompt, processor.image_token_id), sequences[0].grids)


def test_pixels_are_kept_and_the_oldest_forgotten(tmp_path: Path, processor: PolicyProcessor) -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def pixels(self, image: Any) -> Any:
            self.calls.append(image.sha256)
            return processor.pixels(image)

    batch = make_batch(processor, images(tmp_path, 3), 2)
    a, b, c = (g.image for g in batch.groups)
    grid = batch.groups[0].group.image_grid[0]
    one = processor.pixels(a).pixel_values.nbytes
    source = Counting()
    cache = PixelCache(source, limit_bytes=2 * one)  # type: ignore[arg-type]
    for image in (a, b, a, c, a, b):
        cache(image, grid)
    assert source.calls == [image.sha256 for image in (a, b, c, b)]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="nowhere"):
        load_policy(tmp_path / "nowhere", "float32")


def test_batches_survive_the_wire(processor: PolicyProcessor, tmp_path: Path) -> None:
    batch = make_batch(processor, images(tmp_path, 1), 2)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=type(batch))
    assert make_sequences(again) == make_sequences(batch)
