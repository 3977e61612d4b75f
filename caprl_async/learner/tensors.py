"""A micro-batch as tensors: token rows, positions, pixels, and the loss's vectors over its captions.

`collate_shared` packs whole groups into one row without padding, each prompt and each image once;
`collate_repeated` makes one right-padded row for each caption, with a prompt and an image of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from caprl_async.data.processor import Grid
from caprl_async.learner.batch import BadBatch, TrainSequence
from caprl_async.learner.losses import LossTokens
from caprl_async.learner.prefix import GroupSpan, Layout
from caprl_async.types import ImageRef

Positions = Callable[[tuple[int, ...], tuple[Grid, ...]], Tensor]
"""(prompt token ids, grids of its images) -> rotary positions [3, P]."""
Pixels = Callable[[ImageRef, Grid], Tensor]
"""(image, the grid that the engine saw) -> pixel values [patches, dim]."""


@dataclass(frozen=True)
class MicroTensors:
    """S rows of L tokens; C captions with T tokens, one after the other; I images."""

    names: tuple[str, ...]  # C
    input_ids: Tensor  # [S, L]
    pixel_values: Tensor  # [patches of all images, dim]
    image_grid: Tensor  # [I, 3]
    sources: Tensor  # [T] index into S * L of the state that predicts each caption token
    targets: Tensor  # [T] the caption tokens
    token_rows: Tensor  # [T] the number of each one's caption
    behaviour: Tensor  # [T]
    advantages: Tensor  # [T]
    weights: Tensor  # [T]
    staleness: Tensor  # [T]
    # Of a packed row alone:
    layout: Layout | None = None
    position_ids: Tensor | None = None  # [3, 1, L]
    shown: tuple[int, ...] = ()  # the image of each run of placeholders

    @property
    def loss_tokens(self) -> LossTokens:
        return LossTokens(self.behaviour, self.advantages, self.weights, self.token_rows, self.staleness)

    def to(self, device: torch.device) -> MicroTensors:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        layout = self.layout.on(device) if self.layout is not None else None
        return replace(self, layout=layout, **moved)


def collate_shared(
    sequences: Sequence[TrainSequence], pixels: Pixels, positions: Positions, dtype: torch.dtype
) -> MicroTensors:
    """One row of the groups' prompts, each with its captions behind it; on the CPU, loss vectors in `dtype`.

    Neighbours of one group share the prompt. Every caption's positions go on at the prompt's largest + 1 in
    all three rows, and its first token is scored from the prompt's last state.

    Raises:
        BadBatch: one image with two grids, or a group with two prompts.
    """
    images: dict[str, int] = {}
    patches, grids, shown = [], [], []
    ids: list[int] = []
    places, spans, sources = [], [], []
    for _, members in groupby(sequences, key=lambda s: s.group):
        group = list(members)
        first = _one_prompt(group)
        for image, grid in zip(first.images, first.grids, strict=True):
            if image.sha256 not in images:
                images[image.sha256] = len(images)
                patches.append(pixels(image, grid))
                grids.append(grid)
            seen = grids[images[image.sha256]]
            if seen != grid:
                raise BadBatch(f"{first.name}: one image with two grids, {grid} and {seen}")
            shown.append(images[image.sha256])
        start = len(ids)
        ids += first.prompt
        prompt_end = len(ids)
        of_prompt = positions(first.prompt, first.grids)
        places.append(of_prompt)
        ends = []
        for s in group:
            sources += [prompt_end - 1, *range(len(ids), len(ids) + len(s.caption) - 1)]
            ids += s.caption
            ends.append(len(ids))
            places.append((of_prompt.max() + 1 + torch.arange(len(s.caption))).expand(3, -1))
        spans.append(GroupSpan(start, prompt_end, tuple(ends)))
    return MicroTensors(
        input_ids=torch.tensor([ids]),
        pixel_values=torch.cat(patches),
        image_grid=torch.tensor(grids),
        sources=torch.tensor(sources),
        layout=Layout(tuple(spans)),
        position_ids=torch.cat(places, dim=1).unsqueeze(1),
        shown=tuple(shown),
        **_of_captions(sequences, dtype),
    )


def _one_prompt(group: Sequence[TrainSequence]) -> TrainSequence:
    first = group[0]
    for s in group:
        if (s.prompt, s.images, s.grids) != (first.prompt, first.images, first.grids):
            raise BadBatch(f"{s.name}: has another prompt or image than {first.name} of the same group")
    return first


def collate_repeated(sequences: Sequence[TrainSequence], pixels: Pixels, dtype: torch.dtype) -> MicroTensors:
    """A row for each caption, behind its own prompt; on the CPU, the loss's vectors in `dtype`.

    Padding stands right of everything that is read, so a causal model needs no mask to keep it out.
    """
    width = max(s.length for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    sources = []
    for row, s in enumerate(sequences):
        ids[row, : s.length] = torch.tensor(s.prompt + s.caption)
        sources.append(torch.arange(len(s.prompt) - 1, s.length - 1) + row * width)
    images = [shown for s in sequences for shown in zip(s.images, s.grids, strict=True)]
    return MicroTensors(
        input_ids=ids,
        pixel_values=torch.cat([pixels(image, grid) for image, grid in images]),
        image_grid=torch.tensor([grid for _, grid in images]),
        sources=torch.cat(sources),
        **_of_captions(sequences, dtype),
    )


def _of_captions(sequences: Sequence[TrainSequence], dtype: torch.dtype) -> dict[str, Any]:
    """The parts of `MicroTensors` that do not depend on where the tokens lie."""
    lengths = torch.tensor([len(s.caption) for s in sequences])

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)

    return {
        "names": tuple(s.name for s in sequences),
        "targets": torch.tensor([t for s in sequences for t in s.caption]),
        "token_rows": torch.arange(len(sequences)).repeat_interleave(lengths),
        "behaviour": torch.tensor([b for s in sequences for b in s.behaviour], dtype=dtype),
        "advantages": per_token([s.advantage for s in sequences]),
        "weights": per_token([s.weight for s in sequences]),
        "staleness": torch.tensor([a for s in sequences for a in s.staleness], dtype=dtype),
    }
