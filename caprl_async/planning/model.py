"""What a checkpoint's config says of its model: parameters, multiplications, memory per token. No weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A language model, with or without a vision tower."""

    parameters: int  # of all, tied ones once
    tower: int  # of these the tower's
    layers: int
    hidden: int
    inner: int  # width between the two halves of a layer's MLP
    heads: int
    key_values: int  # heads of keys and values
    head: int  # width of a head
    vocabulary: int
    patch: int = 0  # pixels of an image token's side; 0: no tower
    tower_hidden: int = 0
    patches_per_token: int = 0

    @property
    def text(self) -> int:
        """Parameters that a text token meets, the output layer included and the embedding not."""
        return self.parameters - self.tower - self.vocabulary * self.hidden * (1 - self._tied)

    @property
    def _tied(self) -> int:
        # A model without a layer of its own for the output has one matrix for both.
        return int(self.parameters - self.tower < self._body + 2 * self.vocabulary * self.hidden)

    @property
    def _body(self) -> int:
        attention = 2 * self.hidden * self.heads * self.head + 2 * self.hidden * self.key_values * self.head
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def cache_bytes(self, width: int = 2) -> int:
        """Of keys and values per token."""
        return 2 * self.layers * self.key_values * self.head * width

    def image_tokens(self, pixels: int) -> int:
        """Of an image with so many pixels."""
        return max(1, round(pixels / self.patch**2)) if self.patch else 0

    def forward(self, tokens: int, context: float) -> float:
        """Floating-point operations of so many text tokens, each seeing `context` others on average."""
        return tokens * (2.0 * self.text + 4.0 * self.layers * self.heads * self.head * context)

    def see(self, image_tokens: int) -> float:
        """The same of the tower, for one image; its attention within windows is left out."""
        return 2.0 * self.tower * image_tokens * self.patches_per_token


def read_shape(folder: Path) -> Shape:
    """
    Raises:
        ValueError, OSError: the folder holds no config of a known architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config: Any = AutoConfig.from_pretrained(folder)
    vision = getattr(config, "vision_config", None)
    auto = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    text = config.get_text_config()
    tower = 0
    if vision is not None:
        tower = sum(p.numel() for name, p in model.named_parameters() if ".visual." in f".{name}")
    merge = getattr(vision, "spatial_merge_size", 1)
    heads = text.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tower=tower,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        heads=heads,
        key_values=getattr(text, "num_key_value_heads", heads),
        head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        patch=vision.patch_size * merge if vision is not None else 0,
        tower_hidden=vision.hidden_size if vision is not None else 0,
        patches_per_token=merge**2 if vision is not None else 0,
    )
