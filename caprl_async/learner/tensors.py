"""A micro-batch as tensors: padded rows, positions, pixels of each distinct image, the loss's vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from caprl_async.data.processor import Grid
from caprl_async.learner.batch import BadBatch, MicroBatch, TrainSequence
from caprl_async.learner.losses import LossTokens

Positions = Callable[[tuple[int, ...], Grid], Tensor]
"""(prompt token ids, grid) -> rotary positions [3, P]."""
Pixels = Callable[[TrainSequence], Tensor]
"""sequence -> pixel values [patches, dim] of its image."""


@dataclass(frozen=True)
class MicroTensors:
    """S rows of L tokens, right-padded; T caption tokens over all rows, row after row; I distinct images."""

    names: tuple[str, ...]  # of the rows
    row_images: tuple[int, ...]  # S: which image each row shows
    input_ids: Tensor  # [S, L]
    position_ids: Tensor  # [3, S, L]
    pixel_values: Tensor  # [patches of all images, dim]
    image_grid: Tensor  # [I, 3]
    sources: Tensor  # [T] index into S * L of the state that predicts each caption token
    targets: Tensor  # [T] the caption tokens
    token_rows: Tensor  # [T] the row of each
    behaviour: Tensor  # [T]
    advantages: Tensor  # [T]
    weights: Tensor  # [T]
    staleness: Tensor  # [T]

    @property
    def loss_tokens(self) -> LossTokens:
        return LossTokens(self.behaviour, self.advantages, self.weights, self.token_rows, self.staleness)

    def to(self, device: torch.device) -> MicroTensors:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def collate(micro: MicroBatch, pixels: Pixels, positions: Positions, dtype: torch.dtype) -> MicroTensors:
    """Tensors of one micro-batch on the CPU; the loss's vectors have `dtype`.

    A caption token at column c is predicted by the state at column c - 1, so the first one by the prompt's
    last. Captions follow their prompt at its largest position + 1 in all three rows of positions.
    Padding stands right of everything that is read, so a causal mask is enough to keep it out.
    """
    sequences = micro.sequences
    rows, width = len(sequences), max(s.length for s in sequences)
    ids = torch.zeros(rows, width, dtype=torch.long)
    places = torch.zeros(3, rows, width, dtype=torch.long)
    images: dict[str, int] = {}
    patches, grids, sources = [], [], []
    for row, s in enumerate(sequences):
        if s.image.sha256 not in images:
            images[s.image.sha256] = len(images)
            patches.append(pixels(s))
            grids.append(s.grid)
        elif grids[images[s.image.sha256]] != s.grid:
            raise BadBatch(
                f"{s.name}: one image with two grids, {s.grid} and {grids[images[s.image.sha256]]}"
            )
        start = len(s.prompt)
        ids[row, : s.length] = torch.tensor(s.prompt + s.caption)
        prompt_places = positions(s.prompt, s.grid)
        places[:, row, :start] = prompt_places
        places[:, row, start:] = prompt_places.max() + 1 + torch.arange(width - start)
        sources.append(torch.arange(start - 1, s.length - 1) + row * width)
    lengths = torch.tensor([len(s.caption) for s in sequences])

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)

    return MicroTensors(
        names=tuple(s.name for s in sequences),
        row_images=tuple(images[s.image.sha256] for s in sequences),
        input_ids=ids,
        position_ids=places,
        pixel_values=torch.cat(patches),
        image_grid=torch.tensor(grids),
        sources=torch.cat(sources),
        targets=torch.tensor([t for s in sequences for t in s.caption]),
        token_rows=torch.arange(rows).repeat_interleave(lengths),
        behaviour=torch.tensor([b for s in sequences for b in s.behaviour], dtype=dtype),
        advantages=per_token([s.advantage for s in sequences]),
        weights=per_token([s.weight for s in sequences]),
        staleness=torch.tensor([a for s in sequences for a in s.staleness], dtype=dtype),
    )
