"""Supervised training of the tiny policy on captions as people write them, and of its dense counterpart.

`sparse` captions say one or two things of an image, seldom all; `dense` ones say everything. Every step draws
fresh images, so nothing is learnt by heart.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from caprl_async.tiny import grammar
from caprl_async.tiny.tokenizer import tokenizer
from caprl_async.tiny.world import POLICY_PROMPT, World, sample_world

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

MEAN = (0.48145466, 0.4578275, 0.40821073)  # the processor's normalisation
STD = (0.26862954, 0.26130258, 0.27577711)
GRID = 8  # patches per side
VISUAL_TOKENS = 16

Report = Callable[[int, int, float], None]  # step, steps, loss


def caption_for(kind: str, world: World, rng: random.Random) -> str:
    """The training caption: `sparse` or `dense`, the facts in any order."""
    if kind == "sparse":
        return grammar.sparse_caption(world.entities, rng)
    if kind == "dense":
        order = rng.sample(world.entities, len(world.entities))
        return grammar.dense_caption(order, rng.choices(grammar.SHARED, grammar.SHARED_WEIGHTS)[0])
    raise ValueError(f"unknown kind of caption {kind!r}")


def prompt_ids(text: str) -> list[int]:
    """Token ids of the chat prompt with the image's 16 placeholders."""
    words = tokenizer()
    content: Any = [{"type": "image"}, {"type": "text", "text": text}]
    chat = words.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return list(words(str(chat).replace("<|image_pad|>", "<|image_pad|>" * VISUAL_TOKENS)).input_ids)


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pixels [N * 64, 3 * 2 * 14 * 14] of 112 px RGB images, as the Qwen2-VL processor lays them out."""
    raw = np.stack([np.asarray(image) for image in images])  # [N, 112, 112, 3]
    x = (torch.from_numpy(raw).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    x = x.view(len(raw), GRID // 2, 2, 14, GRID // 2, 2, 14, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # [N, row, column, row in 2x2, column in 2x2, channel, y, x]
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # a still image is two equal frames
    return x.reshape(len(raw) * GRID * GRID, 3 * 2 * 14 * 14)


def positions(prompt: Sequence[int], length: int) -> torch.Tensor:
    """Multimodal positions [3, length] of prompt and caption: a 4 x 4 square for the image, then text."""
    first = prompt.index(tokenizer().convert_tokens_to_ids("<|image_pad|>"))
    side = GRID // 2
    rows = torch.arange(VISUAL_TOKENS) // side
    columns = torch.arange(VISUAL_TOKENS) % side
    image = torch.stack([torch.zeros_like(rows), rows, columns]) + first
    rest = torch.arange(length - first - VISUAL_TOKENS) + first + side
    return torch.cat([torch.arange(first).expand(3, -1), image, rest.expand(3, -1)], dim=1)


def batch_vision_attention(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Lets all images of a batch attend in one call: each has 64 patches, so no loop is needed."""

    def forward_for(attention: Any) -> Callable[..., torch.Tensor]:
        def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            low, high = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-high, low), dim=-1) * sin

        def forward(hidden_states: torch.Tensor, position_embeddings: Any = None, **_: Any) -> torch.Tensor:
            heads, size = attention.num_heads, attention.head_dim
            cos, sin = (part.view(-1, GRID * GRID, 1, size) for part in position_embeddings)
            mixed = attention.qkv(hidden_states).view(-1, GRID * GRID, 3, heads, size)
            query, key = turned(mixed[:, :, 0], cos, sin), turned(mixed[:, :, 1], cos, sin)
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), mixed[:, :, 2].transpose(1, 2)
            )
            result: torch.Tensor = attention.proj(out.transpose(1, 2).reshape(hidden_states.shape))
            return result

        return forward

    for block in model.model.visual.blocks:
        block.attn.forward = forward_for(block.attn)


def caption_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    worlds: Sequence[World],
    captions: Sequence[str],
) -> torch.Tensor:
    """Mean cross-entropy over all caption tokens (the end token too)."""
    words, head = tokenizer(), prompt_ids(POLICY_PROMPT)
    said = [[*words(caption).input_ids, words.eos_token_id] for caption in captions]
    longest = max(map(len, said))
    ids = torch.full((len(said), len(head) + longest), int(words.pad_token_id))
    ids[:, : len(head)] = torch.tensor(head)
    labels = torch.full((len(said), longest), -100)
    for row, caption in enumerate(said):
        ids[row, len(head) : len(head) + len(caption)] = torch.tensor(caption)
        labels[row, : len(caption)] = torch.tensor(caption)
    hidden = model.model(
        input_ids=ids,
        position_ids=positions(head, ids.shape[1])[:, None].expand(-1, len(said), -1),
        pixel_values=pixels_of([world.image() for world in worlds]),
        image_grid_thw=torch.tensor([[1, GRID, GRID]] * len(worlds)),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, len(head) - 1 : -1])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def learning_rate(step: int, steps: int, peak: float, floor: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine from `peak` to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_for(model: torch.nn.Module) -> torch.optim.AdamW:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)


def apply_gradient(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One optimizer step at this learning rate, gradients clipped to norm 1 and then cleared."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save_state(path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Everything needed to go on from `step`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    temporary.replace(path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Step to go on from; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def train_captions(
    model: Qwen2_5_VLForConditionalGeneration,
    kind: str,
    steps: int,
    checkpoint: Path,
    report: Report,
    peak: float,
    floor: float,
    batch: int = 32,
    seed: int = 0,
) -> None:
    """Trains in place; a checkpoint every 250 steps lets a broken run go on.

    The learning rate falls from `peak` to `floor`.
    """
    batch_vision_attention(model)
    model.train()
    optimizer = optimizer_for(model)
    start = load_state(checkpoint, model, optimizer)
    for step in range(start, steps):
        rng = random.Random(f"{kind}-{seed}-{step}")
        worlds = [sample_world(rng) for _ in range(batch)]
        captions = [caption_for(kind, world, rng) for world in worlds]
        loss = caption_loss(model, worlds, captions)
        loss.backward()
        apply_gradient(model, optimizer, learning_rate(step, steps, peak, floor))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(checkpoint, step + 1, model, optimizer)
        report(step + 1, steps, float(loss.detach()))
