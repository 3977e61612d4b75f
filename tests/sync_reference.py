"""CapRL, synchronous, in little more than 100 lines of transformers and torch: no Ray, vLLM or code of ours.

It takes the recorded batches of a run with `max_staleness: 0` and computes from the captions, the images and
the verdicts what the ring must have computed: rewards, advantages, and the parameters after every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass(frozen=True)
class Settings:
    """What the run was told to do; the names are those of its conf."""

    model: str
    pixels: int  # min_pixels = max_pixels
    steps: int
    lr: float
    warmup_steps: int
    min_lr_ratio: float
    betas: tuple[float, float]
    grad_norm: float
    temperature: float
    clip: float  # clip_low = clip_high
    importance_high: float


@dataclass(frozen=True)
class Step:
    """What one step must have come to."""

    rewards: list[list[float]]  # [group][caption]
    advantages: list[list[float]]
    gap: float  # largest |engine - reference| log-probability of a caption token
    parameters: dict[str, torch.Tensor]


def read_batch(path: Path) -> dict[str, Any]:
    """A recorded batch as plain dictionaries."""
    return msgspec.msgpack.decode(path.read_bytes())["batch"]


def reward(verdicts: Sequence[dict[str, Any]]) -> float:
    """Mean score of a caption over the questions that were scored."""
    scores = [v["score"] for v in verdicts if v["outcome"] == "scored"]
    return sum(scores) / len(scores)


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / std within the group (GRPO, arXiv 2402.03300)."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


def learning_rate(step: int, s: Settings) -> float:
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    share = (step - s.warmup_steps) / (s.steps - s.warmup_steps)
    return s.lr * (s.min_lr_ratio + (1 - s.min_lr_ratio) * (1 + math.cos(math.pi * share)) / 2)


class Reference:
    """The model, one caption at a time, with nothing shared and nothing padded."""

    def __init__(self, settings: Settings) -> None:
        self.s = settings
        self.model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(settings.model)
        self.images = processor.image_processor
        tokenizer = processor.tokenizer
        vocabulary = self.model.config.get_text_config().vocab_size
        named = set(tokenizer.get_vocab().values())
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        # The end may be sampled; markup and ids without a name may not.
        self.banned = [
            i for i in range(vocabulary) if (i in special or i not in named) and i != tokenizer.eos_token_id
        ]
        self.adam = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=0.0
        )

    def logprobs(self, group: dict[str, Any], image: str, caption: Sequence[int]) -> torch.Tensor:
        size = {"shortest_edge": self.s.pixels, "longest_edge": self.s.pixels}
        pixels = self.images(images=[Image.open(image).convert("RGB")], size=size, return_tensors="pt")
        ids = torch.tensor([[*group["prompt_token_ids"], *caption]])
        logits = self.model(
            input_ids=ids,
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
        ).logits[0, -len(caption) - 1 : -1]
        logits = logits.index_fill(1, torch.tensor(self.banned), -math.inf) / self.s.temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(caption)[:, None])[:, 0]

    def step(self, batch: dict[str, Any]) -> Step:
        """One update: GRPO with a token mean, truncated importance weights and a PPO clip."""
        groups = batch["groups"]
        rewards = [[reward(verdicts) for verdicts in scored["verdicts"]] for scored in groups]
        wanted = [advantages(group) for group in rewards]
        tokens = sum(len(c["token_ids"]) for scored in groups for c in scored["group"]["captions"])
        gap = 0.0
        self.adam.zero_grad()
        for scored, scale in zip(groups, wanted, strict=True):
            for caption, advantage in zip(scored["group"]["captions"], scale, strict=True):
                current = self.logprobs(scored["group"], scored["image"]["path"], caption["token_ids"])
                behaviour = torch.tensor(caption["logprobs"])
                proximal = current.detach()
                weight = (proximal - behaviour).exp().clamp(max=self.s.importance_high)
                ratio = (current - proximal).exp()
                bound = ratio.clamp(1 - self.s.clip, 1 + self.s.clip)
                gain = torch.minimum(ratio * advantage, bound * advantage)
                (-(weight * gain).sum() / tokens).backward()
                gap = max(gap, (proximal - behaviour).abs().max().item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.grad_norm)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(batch["version"][1], self.s)
        self.adam.step()
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return Step(rewards, wanted, gap, parameters)


def replay(paths: Sequence[Path], reference: Reference) -> Iterator[tuple[dict[str, Any], Step]]:
    """(recorded batch, what it must have come to) of each step."""
    for path in paths:
        batch = read_batch(path)
        yield batch, reference.step(batch)
