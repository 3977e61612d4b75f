"""Shapes of the tiny models, and how they are saved so that no reader sees half of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from caprl_async.tiny.tokenizer import (
    END_OF_TEXT,
    IMAGE_PAD,
    TURN_END,
    VIDEO_PAD,
    save_processor,
    save_tokenizer,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

ModelT = TypeVar("ModelT", "Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration")

MODELS = Path(__file__).parent / "models"
HEAD = 32  # channels per attention head: the smallest that vLLM's CPU attention takes


def _ends() -> dict[str, Any]:
    ids = vocabulary()
    return {"bos_token_id": ids[END_OF_TEXT], "eos_token_id": ids[TURN_END], "pad_token_id": ids[END_OF_TEXT]}


def new_policy(width: int = 128, layers: int = 4) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of about 2 M parameters with fresh weights (torch's seed decides them)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = vocabulary()
    text: dict[str, Any] = {
        "vocab_size": len(ids),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        **_ends(),
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 128 // HEAD,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1, 2, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        **_ends(),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def deeper(old: ModelT, grown: ModelT) -> ModelT:
    """Gives `grown`, of the same width and more layers, what `old` can do: its fresh layers lie on top and
    change little at first.
    """
    import torch

    known = old.get_decoder().config.num_hidden_layers
    grown.load_state_dict(old.state_dict(), strict=False)
    with torch.no_grad():
        for layer in grown.get_decoder().layers[known:]:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return grown


def new_judge(width: int = 128, layers: int = 4) -> Qwen2ForCausalLM:
    """A Qwen2 of about 1 M parameters with fresh weights. Tied embeddings would never learn the look-up."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        **_ends(),
    )
    return Qwen2ForCausalLM(config)


def _keep_tokenizer_class(folder: Path) -> None:
    """Makes `AutoTokenizer` read the word-level tokenizer as saved.

    For checkpoints of type qwen2 it overrules the declared class with Qwen's byte-level one, unless the file
    names code of its own; an empty name is enough, and no code is run.
    """
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, None]}}
    path.write_text(json.dumps(described, indent=2) + "\n")


def save_model(model: PreTrainedModel, folder: Path, vision: bool) -> None:
    """Writes model and tokenizer (or processor) beside `folder`, then puts it in its place in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(fresh)
    if vision:
        save_processor(fresh)
    else:
        save_tokenizer(fresh)
        _keep_tokenizer_class(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
