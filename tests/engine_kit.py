"""Shared by the tests of engine, rollout and processor: tiny checkpoints, images, engine settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caprl_async.config import EngineConfig
from caprl_async.types import ImageRef

MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 64 * 28 * 28
PROMPT = "describe the image ."


def tiny_model(name: str, scratch: Path) -> str:
    """The committed checkpoint, or one with fresh weights when it has not been built."""
    from caprl_async.tiny import models

    committed = models.MODELS / name
    if (committed / "model.safetensors").exists():
        return str(committed)
    vision = name.startswith("policy")
    models.save_model(models.new_policy() if vision else models.new_judge(), scratch / name, vision)
    return str(scratch / name)


def tiny_engine(**changes: Any) -> EngineConfig:
    """Settings for one engine inside the test's process."""
    settings: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "kv_cache_gib": 0.1,
        "dtype": "float32",
        "enforce_eager": True,
        "in_process": True,
        "threads": 1,
    }
    return EngineConfig(**{**settings, **changes})


def noise_image(folder: Path, width: int, height: int, seed: int = 0) -> ImageRef:
    """A written image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = folder / f"{width}x{height}-{seed}.png"
    Image.fromarray(pixels).save(path)
    return ImageRef(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), path=str(path))
