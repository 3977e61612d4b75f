"""Several updates on one batch against a plain loop, and gradients that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from sync_reference import advantages

from caprl_async.config import Config
from caprl_async.types import TrainBatch

pytestmark = pytest.mark.slow

CLIP = 0.05


@dataclass
class Found:
    """What the loop came to."""

    parameters: dict[str, torch.Tensor]
    gaps: list[list[float]] = field(default_factory=list)  # per update: |current - behaviour|
    ratios: list[list[float]] = field(default_factory=list)
    clipped: list[list[bool]] = field(default_factory=list)


def by_hand(batch: TrainBatch, config: Config, *, anchored: bool) -> Found:
    """Two updates, each on half of the groups; the proximal policy is the one before both (`anchored`)."""
    plain = plain_reference(config)
    groups = [msgspec.to_builtins(scored) for scored in batch.groups]
    anchors = [plain_logprobs(plain, scored) for scored in batch.groups]
    half = len(groups) // 2
    found = Found({})
    for part in (slice(0, half), slice(half, None)):
        found.gaps.append([])
        found.ratios.append([])
        found.clipped.append([])
        tokens = sum(len(c["token_ids"]) for scored in groups[part] for c in scored["group"]["captions"])
        plain.adam.zero_grad()
        for scored, anchor in zip(groups[part], anchors[part], strict=True):
            scale = advantages([parts["total"] for parts in scored["rewards"]])
            for i, caption in enumerate(scored["group"]["captions"]):
                current = plain.logprobs(scored["group"], scored["image"]["path"], caption["token_ids"])
                proximal = anchor[i] if anchored else current.tolist()
                loss = torch.zeros(())
                for now, near, then in zip(current, proximal, caption["logprobs"], strict=True):
                    weight = min(math.exp(near - then), 2.0)
                    ratio = (now - near).exp()
                    bound = min(max(ratio.item(), 1 - CLIP), 1 + CLIP)
                    held = bound * scale[i] < ratio.item() * scale[i]
                    loss = loss - weight * (bound if held else ratio) * scale[i] / tokens
                    found.gaps[-1].append(abs(now.item() - then))
                    found.ratios[-1].append(ratio.item())
                    found.clipped[-1].append(held)
                loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), config.learner.grad_norm)
        plain.adam.step()
    found.parameters = {name: p.detach() for name, p in plain.model.named_parameters()}
    return found


def _mean(updates: Sequence[Sequence[float]]) -> float:
    return sum(sum(update) / len(update) for update in updates) / len(updates)


def two_updates(_: int, folder: str) -> None:
    join_alone()
    from caprl_async.learner.trainer import Trainer

    # Small micro-batches, so that each must find its own anchor.
    config = tiny_config(warmup_steps=1, lr=1e-3, updates_per_batch=2, micro_batch_tokens=100)
    config.learner.correction.trust_region.clip_low = CLIP
    config.learner.correction.trust_region.clip_high = CLIP
    processor = tiny_processor()
    plain = plain_reference(config)
    start = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    batch = near_policy(make_batch(processor, images(Path(folder), 4), 3, lengths=(2, 12)), plain)

    trainer = Trainer(config, processor, 0, 1)
    metrics = trainer.train(batch)
    ours = trainer.engine.gather(trainer.hf)
    assert ours is not None
    found = by_hand(batch, config, anchored=True)
    other = by_hand(batch, config, anchored=False)

    def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum((one[n] - two[n]).double().square().sum().item() for n in one))

    moved = apart(found.parameters, start)
    print(f"parameters {apart(ours, found.parameters) / moved:.1e} of the way apart")
    # Adam divides by the gradient's size, so where that is only rounding error, rounding decides.
    assert apart(ours, found.parameters) < 1e-2 * moved
    assert apart(other.parameters, found.parameters) > 5e-2 * moved, "clipping made no difference"
    assert found.ratios[0] == pytest.approx([1.0] * len(found.ratios[0]), abs=1e-5)
    assert max(found.ratios[1]) > 1 + CLIP
    assert metrics["ratio_max"] == pytest.approx(max(found.ratios[1]), rel=1e-2)
    assert metrics["clip_fraction"] == pytest.approx(_mean(found.clipped), abs=0.05)
    assert metrics["logprob_gap_max"] == pytest.approx(max(found.gaps[0]), abs=1e-3)
    assert metrics["logprob_gap_mean"] == pytest.approx(_mean(found.gaps[:1]), abs=1e-3)
    torch.distributed.destroy_process_group()


def test_two_updates_equal_a_plain_loop(tmp_path: Path) -> None:
    mp.spawn(two_updates, (str(tmp_path),), nprocs=1)


def bad_gradients(_: int, folder: str) -> None:
    join_alone()
    from caprl_async.learner.batch import NotFinite
    from caprl_async.learner.trainer import Trainer

    processor = tiny_processor()
    batch = make_batch(processor, images(Path(folder), 2), 3, lengths=(2, 6))
    for stage, dtype in ((0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")):
        trainer = Trainer(tiny_config(zero_stage=stage, dtype=dtype), processor, 0, 1)
        before = trainer.engine.gather(trainer.hf)
        named = dict(trainer.hf.named_parameters())
        named["model.language_model.norm.weight"].register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(NotFinite, match="gradient") as stopped:
            trainer.train(batch)
        assert len(stopped.value.captions) == 6
        after = trainer.engine.gather(trainer.hf)
        assert before is not None
        assert after is not None
        moved = [name for name in before if not torch.equal(after[name], before[name])]
        assert not moved, f"ZeRO {stage}, {dtype}: the optimizer has moved"
    torch.distributed.destroy_process_group()


def test_a_gradient_that_is_no_number_moves_nothing(tmp_path: Path) -> None:
    """At any ZeRO stage, in float32 and in bfloat16."""
    mp.spawn(bad_gradients, (str(tmp_path),), nprocs=1)
