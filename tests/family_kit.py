"""Tiny random captioners of each family, and captions about images of noise, for the learner's tests."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caprl_async.data.processor import Grid
from caprl_async.learner.batch import TrainSequence
from caprl_async.types import ImageRef

IMAGE, VIDEO, START, END = 5, 6, 7, 8
BANNED = (0, IMAGE, VIDEO, START, END)
VOCABULARY = 60
PATCH_VALUES = 3 * 2 * 4 * 4

_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
    },
}
_TOWERS["qwen3_vl_moe"] = _TOWERS["qwen3_vl"]


def tiny_family(kind: str, tied: bool = False, **text: Any) -> Any:
    """A captioner of `model_type` kind with random weights: 2 layers, 4 heads, 2 of keys, 4 px patches."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        text_config={
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            "tie_word_embeddings": tied,
            **text,
        },
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 4, **_TOWERS[kind]},
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases start at 0 and norms at 1, which hides what they do
            nn.init.normal_(parameter, mean=float("norm" in name and "bias" not in name), std=0.2)
        else:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def compute_in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes transformers' float32 islands (RMSNorm, the vision tower's rotation) work in float64 too."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)
    monkeypatch.setattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb_vision", _rotate)
    return model.double()


def _rms_norm(norm: Any, states: Tensor) -> Tensor:
    return nn.functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def turn(x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-two, one), dim=-1) * sin).to(x.dtype)

    return turn(query), turn(key)


def noise(dtype: torch.dtype = torch.float32) -> Callable[[ImageRef, Grid], Tensor]:
    """Pixels [patches, dim] that depend on the image's name alone."""

    def pixels(image: ImageRef, grid: Grid) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(image.sha256.encode()))
        return torch.randn(grid[0] * grid[1] * grid[2], PATCH_VALUES, generator=draw).to(dtype)

    return pixels


def captions_of(shapes: list[tuple[list[Grid], int, list[int]]], seed: int = 0) -> list[TrainSequence]:
    """One group for each (grids of its images, words of its prompt, lengths of its captions)."""
    draw = random.Random(seed)
    words = [i for i in range(1, VOCABULARY) if i not in BANNED]
    made = []
    for group, (grids, text, lengths) in enumerate(shapes):
        prompt: list[int] = []
        for t, h, w in grids:
            prompt += [draw.choice(words), START, *[IMAGE] * (t * h * w // 4), END]
        prompt += draw.choices(words, k=text)
        for i, length in enumerate(lengths):
            made.append(
                TrainSequence(
                    name=f"{group}[{i}]",
                    group=group,
                    images=tuple(ImageRef(sha256=f"{group}/{k}/{seed}", path="") for k in range(len(grids))),
                    grids=tuple(grids),
                    prompt=tuple(prompt),
                    caption=tuple(draw.choices(words, k=length)),
                    behaviour=tuple(-4 * draw.random() for _ in range(length)),
                    staleness=(0,) * length,
                    reward=0.0,
                    advantage=draw.uniform(-1, 1),
                    weight=0.05,
                )
            )
    return made
