"""Memory and time of each role, and how many GPUs each should have. Pure.

The rules of thumb, and how far they are from what was measured, are in docs/plan.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from caprl_async.planning.model import Shape

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One card, as its maker describes it."""

    memory_gib: float
    tflops: float  # bfloat16, dense
    gb_s: float  # of its memory


GPUS: Mapping[str, Gpu] = {
    "a10g": Gpu(22.5, 70, 600),
    "l40s": Gpu(44.7, 362, 864),
    "rtx4090": Gpu(24.0, 165, 1008),
    "a100_40": Gpu(39.4, 312, 1555),
    "a100_80": Gpu(79.3, 312, 2039),
    "h100": Gpu(79.6, 989, 3350),
    "h200": Gpu(139.8, 989, 4800),
    "b200": Gpu(178.4, 2250, 8000),
}


@dataclass(frozen=True)
class Work:
    """What one learner batch asks of each role."""

    groups: int
    group_size: int
    prompt_tokens: int  # with the image's
    image_tokens: int
    caption_tokens: float  # mean
    questions: int  # per image
    question_tokens: float  # with options and all that stands around it

    @property
    def captions(self) -> int:
        return self.groups * self.group_size


@dataclass(frozen=True)
class Rates:
    """Shares of a card's rate that are reached."""

    train: float  # of its operations, recomputation not counted
    prefill: float
    decode: float  # of its memory's bandwidth


@dataclass(frozen=True)
class Learning:
    """What of the learner's conf decides its memory."""

    ranks: int
    zero_stage: int
    bytes_per_parameter: int  # 2 or 4
    offload: bool
    adapters: int  # parameters of LoRA; 0: all are trained
    checkpointing: bool
    micro_batch_tokens: int
    logprob_chunk: int
    frozen: int = 0  # parameters that are not trained
    reference: bool = False  # the start, held whole on each rank, for the KL


# ---------------------------------------------------------------- memory


def learner_gib(shape: Shape, how: Learning) -> float:
    """At most, on one rank: weights, gradients (in their own and in single precision), master weights, Adam's
    two moments, activations of a micro-batch, logits of a chunk."""
    trained = how.adapters or shape.parameters - how.frozen
    weights = float(shape.parameters * how.bytes_per_parameter)
    gradients = float(trained * (how.bytes_per_parameter + (4 if how.bytes_per_parameter == 2 else 0)))
    states = float(trained * (12 if how.bytes_per_parameter == 2 else 8))
    if how.offload:
        states = 0
    if how.zero_stage >= 1:
        states /= how.ranks
    if how.zero_stage >= 2:
        gradients /= how.ranks
    if how.zero_stage >= 3:
        weights /= how.ranks
    if how.reference:
        weights += shape.parameters * how.bytes_per_parameter
    layer = 2 * (4 * shape.inner + 18 * shape.hidden) * how.micro_batch_tokens * how.bytes_per_parameter / 2
    kept = shape.layers * shape.hidden * how.bytes_per_parameter * how.micro_batch_tokens
    activations = kept + layer if how.checkpointing else shape.layers * layer
    logits = 3 * 4 * how.logprob_chunk * shape.vocabulary
    return (weights + gradients + states + activations + logits) / GIB


def engine_gib(shape: Shape, tokens: float, tensor_parallel: int, width: int = 2) -> float:
    """Of one card of an engine that holds so many tokens at one time, and the least that it works with."""
    return (shape.parameters * width + tokens * shape.cache_bytes(width)) / tensor_parallel / GIB + 2.0


# ---------------------------------------------------------------- seconds of one GPU per batch


def learner_s(shape: Shape, work: Work, gpu: Gpu, rates: Rates, frozen_tower: bool) -> float:
    """Image and prompt once per group; backward twice the forward."""
    tokens = work.groups * (work.prompt_tokens + work.group_size * work.caption_tokens)
    forward = shape.forward(int(tokens), work.prompt_tokens + work.caption_tokens / 2)
    towers = work.groups * shape.see(work.image_tokens) * (1 / 3 if frozen_tower else 1)
    return 3 * (forward + towers) / (gpu.tflops * 1e12 * rates.train)


def rollout_s(shape: Shape, work: Work, gpu: Gpu, rates: Rates, sequences: int) -> float:
    """Prefill once per group, then decoding of `sequences` captions at one time, bound by memory."""
    prefill = shape.forward(work.prompt_tokens, work.prompt_tokens / 2) + shape.see(work.image_tokens)
    seen = work.prompt_tokens + work.caption_tokens / 2
    moved = shape.text * 2 + sequences * seen * shape.cache_bytes()
    step = max(
        moved / (gpu.gb_s * 1e9 * rates.decode),
        shape.forward(sequences, seen) / (gpu.tflops * 1e12 * rates.prefill),
    )
    decoding = work.captions * work.caption_tokens / sequences * step
    return work.groups * prefill / (gpu.tflops * 1e12 * rates.prefill) + decoding


def judge_s(shape: Shape, work: Work, gpu: Gpu, rates: Rates) -> float:
    """One prefill of each caption, and of each of its questions behind it."""
    caption = shape.forward(int(work.caption_tokens), work.caption_tokens / 2)
    question = shape.forward(int(work.question_tokens), work.caption_tokens + work.question_tokens / 2)
    return work.captions * (caption + work.questions * question) / (gpu.tflops * 1e12 * rates.prefill)


def sync_s(shape: Shape, gb_s: float, engines: int) -> float:
    """One broadcast of all weights in bfloat16 over the slowest link; a pipelined one does not grow with the
    engines but for its start."""
    return shape.parameters * 2 / (gb_s * 1e9) * (1 + 0.02 * math.log2(max(2, engines)))


# ---------------------------------------------------------------- the split


@dataclass(frozen=True)
class Split:
    """GPUs of each role, and the seconds that a batch takes each."""

    gpus: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda role: self.seconds[role])

    @property
    def batch_s(self) -> float:
        """Roles work side by side: a batch takes as long as the slowest."""
        return max(self.seconds.values())


def split(gpus: Mapping[str, float], alone: Mapping[str, float]) -> Split:
    """`alone`: seconds of a batch on one GPU; a role of no GPU (a served judge) takes none of ours."""
    return Split(dict(gpus), {role: alone[role] / gpus[role] for role in gpus if gpus[role]})


def best_split(
    total: int,
    units: Mapping[str, int],
    alone: Mapping[str, float],
    fits: Callable[[str, int], bool] = lambda role, gpus: True,
) -> Split | None:
    """The split of `total` GPUs with the fastest batch; a role has multiples of its unit (the GPUs of one
    engine), on which it `fits`. None if there are too few."""
    roles = list(units)
    best: Split | None = None

    def place(index: int, left: int, chosen: dict[str, int]) -> None:
        nonlocal best
        role = roles[index]
        rest = sum(units[one] for one in roles[index + 1 :])
        last = index == len(roles) - 1
        most = left - rest
        for count in range(most - most % units[role] if last else units[role], most + 1, units[role]):
            if count < units[role] or not fits(role, count):
                continue
            now = {**chosen, role: count}
            if last:
                found = split(now, alone)
                if best is None or found.batch_s < best.batch_s:
                    best = found
            else:
                place(index + 1, left - count, now)

    place(0, total, {})
    return best
