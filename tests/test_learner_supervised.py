"""Supervised steps against transformers' own loss and a plain optimizer; what is frozen; validation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from learner_kit import POLICY, images, join_alone, tiny_config, tiny_processor
from PIL import Image

from caprl_async.config import Config
from caprl_async.data.index import Ready
from caprl_async.data.processor import PolicyProcessor
from caprl_async.learner.engine import learning_rate

TEXTS = [
    ["topleft red circle .", "bottomright blue square . topleft green star ."],
    ["topright red square .", "topleft blue . bottomleft green circle . red star .", "blue ."],
    ["bottomleft green triangle ."],
]


def ready(processor: PolicyProcessor, folder: Path) -> list[Ready]:
    rows = []
    for i, (ref, texts) in enumerate(zip(images(folder, len(TEXTS)), TEXTS, strict=True)):
        ids = [found for text in texts if (found := processor.answer_ids(text)) is not None]
        assert ids
        prompt = processor.prompt_ids("describe the image .")
        rows.append(Ready(f"row-{i}", ref, (processor.grid(112, 112),), prompt, tuple(ids)))
    return rows


def plain_loss(model: Any, processor: PolicyProcessor, rows: list[Ready]) -> torch.Tensor:
    """Mean over all tokens of all texts, by transformers itself, one text at a time."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        pixels = processor._images(images=[Image.open(row.image.path).convert("RGB")], return_tensors="pt")
        for text in row.texts:
            prompt = processor.expanded(row.prompt, row.grids)
            ids = torch.tensor([[*prompt, *text]])
            out = model(
                input_ids=ids,
                labels=torch.tensor([[-100] * len(prompt) + list(text)]),
                pixel_values=pixels["pixel_values"],
                image_grid_thw=pixels["image_grid_thw"],
                mm_token_type_ids=(ids == processor.image_token_id).int(),
            )
            total = total + out.loss * len(text)
            tokens += len(text)
    return total / tokens


def by_hand(
    config: Config, processor: PolicyProcessor, rows: list[Ready], steps: int
) -> tuple[list[float], Any]:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(POLICY, dtype=torch.float32)
    learner = config.learner
    adam = torch.optim.AdamW(model.parameters(), lr=learner.lr, betas=tuple(learner.betas), weight_decay=0.0)
    losses = []
    for step in range(steps):
        adam.zero_grad()
        loss = plain_loss(model, processor, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), learner.grad_norm)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, config.steps, learner)
        adam.step()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def supervised_steps(_: int, folder: str) -> None:
    join_alone()
    from caprl_async.learner.supervised import SupervisedTrainer, sequences_of

    processor = tiny_processor()
    rows = ready(processor, Path(folder))
    config = tiny_config(warmup_steps=2, micro_batch_tokens=100)
    trainer = SupervisedTrainer(config, processor, 0, 1)
    start = trainer.engine.gather(trainer.hf)
    sequences = sequences_of(rows, processor)
    first = trainer.validate(sequences)
    steps = [trainer.fit(sequences, step) for step in range(3)]
    ours = trainer.engine.gather(trainer.hf)
    assert start is not None
    assert ours is not None
    losses, theirs = by_hand(config, processor, rows, 3)
    assert first["validation_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-3)
    assert steps[2]["loss"] < steps[0]["loss"]
    assert steps[0]["text_tokens"] == first["validation_tokens"] == sum(len(t) for r in rows for t in r.texts)

    def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum((one[n] - two[n].detach()).double().square().sum().item() for n in one))

    assert apart(ours, theirs) < 1e-2 * apart(ours, start)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_supervised_steps_equal_a_plain_loop(tmp_path: Path) -> None:
    mp.spawn(supervised_steps, (str(tmp_path),), nprocs=1)


def only_the_merger(_: int, folder: str) -> None:
    join_alone()
    from caprl_async.learner.model import BadModel
    from caprl_async.learner.supervised import SupervisedTrainer, sequences_of

    processor = tiny_processor()
    sequences = sequences_of(ready(processor, Path(folder)), processor)
    trainer = SupervisedTrainer(tiny_config(train_only=["visual.merger"]), processor, 0, 1)
    before = trainer.engine.gather(trainer.hf)
    trainer.fit(sequences, 5)
    after = trainer.engine.gather(trainer.hf)
    assert before is not None
    assert after is not None
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("visual.merger" in name for name in moved)
    with pytest.raises(BadModel, match="train_only"):
        SupervisedTrainer(tiny_config(train_only=["projector"]), processor, 0, 1)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_only_what_is_named_is_trained(tmp_path: Path) -> None:
    mp.spawn(only_the_merger, (str(tmp_path),), nprocs=1)
