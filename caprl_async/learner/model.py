"""The captioner as the learner sees it: a micro-batch in, the log-probability of each caption token out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caprl_async.data.processor import Grid
from caprl_async.learner.batch import BadBatch
from caprl_async.learner.head import ScoringHead
from caprl_async.learner.tensors import MicroTensors, Positions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BadModel(ValueError):
    """The checkpoint is not a captioner that the learner can train; the message says why."""


def load_policy(path: str | Path, dtype: str) -> Any:
    """A vision-language model of transformers from a checkpoint folder, on the CPU.

    Raises:
        BadModel: not a folder, an unknown dtype, or a model with sliding-window attention.
    """
    from transformers import AutoModelForImageTextToText

    if not Path(path).is_dir():
        raise BadModel(f"policy.model: {path} is not a folder with a Hugging Face checkpoint")
    if dtype not in _DTYPES:
        raise BadModel(f"learner.dtype: {dtype} is none of {', '.join(_DTYPES)}")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=_DTYPES[dtype], local_files_only=True)
    if not hasattr(model.model, "get_rope_index") or not hasattr(model.model, "visual"):
        raise BadModel(f"{path}: {type(model).__name__} is not a Qwen-VL model with rotary image positions")
    if "sliding_attention" in getattr(model.config.get_text_config(), "layer_types", []):
        raise BadModel(f"{path}: sliding-window attention is not supported")
    return model


def prompt_positions(model: Any, image_token_id: int) -> Positions:
    """The model's own rotary positions of a prompt, [3, P], remembered for the prompts of a batch."""

    @lru_cache(maxsize=4096)
    def positions(prompt: tuple[int, ...], grid: Grid) -> Tensor:
        ids = torch.tensor([prompt])
        merge = model.config.vision_config.spatial_merge_size
        expected = grid[0] * grid[1] * grid[2] // merge**2
        found = prompt.count(image_token_id)
        if found != expected:
            raise BadBatch(
                f"a prompt has {found} image tokens, but its image of grid {grid} makes {expected}"
            )
        kinds = (ids == image_token_id).int()
        places, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=torch.tensor([grid]))
        return places[:, 0]

    return positions


class PolicyModel(nn.Module):
    """The transformers model with a `ScoringHead` in place of its own."""

    def __init__(self, hf: Any, banned: Iterable[int], temperature: float, chunk: int) -> None:
        """`chunk` is the number of caption tokens whose vocabulary logits exist at one time.

        Raises:
            BadModel: the output layer is not a plain matrix.
        """
        super().__init__()
        if not isinstance(hf.lm_head, nn.Linear) or hf.lm_head.bias is not None:
            raise BadModel(f"{type(hf).__name__}: the output layer must be a linear map without bias")
        hf.lm_head = ScoringHead(hf.lm_head.weight, banned, temperature, chunk)
        self.hf: Any = hf

    def forward(self, batch: MicroTensors) -> tuple[Tensor, Tensor]:
        """(log-probabilities [T], entropies [T]) of the caption tokens."""
        states = self._hidden(batch).flatten(0, 1)[batch.sources]
        return self.hf.lm_head(states, batch.targets)

    def _hidden(self, batch: MicroTensors) -> Tensor:
        """Last hidden states [S, L, D]; the vision tower sees each distinct image once."""
        inner = self.hf.model
        embeds = inner.language_model.embed_tokens(batch.input_ids)
        seen = inner.get_image_features(
            batch.pixel_values.to(embeds.dtype), batch.image_grid, return_dict=True
        ).pooler_output
        shown = torch.cat([seen[image] for image in batch.row_images]).to(embeds.dtype)
        places = batch.input_ids == self.hf.config.image_token_id
        embeds = embeds.masked_scatter(places.unsqueeze(-1), shown)
        # No mask: causal is all that right-padded rows need, and it is the fastest kernel.
        out = inner.language_model(inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False)
        return out.last_hidden_state
