"""From a train batch to captions as flat sequences, with their advantages and weights in the loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from caprl_async.config import AdvantageConfig, Aggregation, RewardConfig
from caprl_async.data.processor import Grid
from caprl_async.learner.advantages import batch_advantages
from caprl_async.learner.losses import token_weights
from caprl_async.reward.reward import term_values, term_weights
from caprl_async.types import CaptionGroup, ImageRef, ScoredGroup, TrainBatch


class BadBatch(ValueError):
    """A train batch contradicts itself, by a fault of its sender; the message names the prompt."""


class NotFinite(FloatingPointError):
    """A log-probability, weight, reward, loss or gradient is NaN or infinite; its update moved nothing."""

    def __init__(self, message: str, captions: Sequence[str]) -> None:
        super().__init__(message)
        self.captions = tuple(captions)  # names of the offending ones

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.captions)


@dataclass(frozen=True)
class TrainSequence:
    """One caption to train on, with the prompt that led to it."""

    name: str  # prompt key, attempt and caption number, for messages
    group: int  # captions of one prompt have the same number
    images: tuple[ImageRef, ...]  # of the prompt, in its order
    grids: tuple[Grid, ...]  # (t, h, w) patches of each as the engine saw it
    prompt: tuple[int, ...]  # P token ids, placeholders expanded
    caption: tuple[int, ...]  # T token ids
    behaviour: tuple[float, ...]  # T
    staleness: tuple[int, ...]  # T, learner steps
    reward: float
    terms: tuple[float, ...] = ()  # of the reward, without their weights: `reward.TERMS`
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the loss; 0: computed, but trains nothing

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.caption)


# ---------------------------------------------------------------- sequences


def caption_name(group: CaptionGroup, number: int) -> str:
    """What messages and files call one caption of a group: prompt key, attempt, number."""
    return f"{group.key}@{group.attempt}[{number}]"


def make_sequences(batch: TrainBatch, banned: Collection[int] = ()) -> list[TrainSequence]:
    """The captions of all groups, with their rewards.

    Raises:
        BadBatch: lengths, versions, rewards or images of a group do not fit together, or a caption holds a
            token that the engine must not sample (`banned`).
        NotFinite: a reward or a log-probability is no number.
    """
    sequences: list[TrainSequence] = []
    never = frozenset(banned)
    for number, scored in enumerate(batch.groups):
        rewards = check_group(scored)
        group = scored.group
        for i, (caption, reward, parts) in enumerate(
            zip(group.captions, rewards, scored.rewards, strict=True)
        ):
            if not never.isdisjoint(caption.token_ids):
                raise BadBatch(
                    f"{caption_name(group, i)}: holds the banned tokens "
                    f"{sorted(never.intersection(caption.token_ids))}; engine and learner must ban the same"
                )
            staleness = [0] * len(caption.token_ids)
            for span in caption.spans:
                age = batch.version.step - span.version.step
                staleness[span.start : span.end] = [age] * (span.end - span.start)
            sequences.append(
                TrainSequence(
                    name=caption_name(group, i),
                    group=number,
                    images=scored.image.pictures,
                    grids=group.image_grid,
                    prompt=group.prompt_token_ids,
                    caption=caption.token_ids,
                    behaviour=caption.logprobs,
                    staleness=tuple(staleness),
                    reward=reward,
                    terms=term_values(parts),
                )
            )
    return sequences


def with_advantages(
    sequences: Sequence[TrainSequence], config: AdvantageConfig, reward: RewardConfig
) -> list[TrainSequence]:
    """The captions of the groups with something to learn; groups of equal rewards are left out.

    With `per_term` what counts is the terms of the rewards, else the rewards.
    """
    groups = [list(members) for _, members in groupby(sequences, key=lambda s: s.group)]
    if config.per_term:
        columns = [[s.terms for s in members] for members in groups]
        found = batch_advantages(columns, config, term_weights(reward))
    else:
        found = batch_advantages([[(s.reward,) for s in members] for members in groups], config, (1.0,))
    return [
        replace(s, advantage=advantage)
        for members, advantages in zip(groups, found, strict=True)
        if any(advantages)
        for s, advantage in zip(members, advantages, strict=True)
    ]


def check_group(scored: ScoredGroup) -> list[float]:
    """The rewards of a group whose parts fit together.

    Raises:
        BadBatch: they do not.
        NotFinite: a reward or a log-probability is no number.
    """
    group = scored.group
    name = f"{group.key}@{group.attempt}"
    if len(group.captions) != len(scored.rewards):
        raise BadBatch(f"{name}: {len(group.captions)} captions but {len(scored.rewards)} rewards")
    if group.image_sha256 != scored.image.sha256:
        raise BadBatch(f"{name}: captioned image {group.image_sha256}, but row shows {scored.image.sha256}")
    if len(group.image_grid) != len(scored.image.pictures):
        raise BadBatch(
            f"{name}: {len(group.image_grid)} pictures were captioned, the row has "
            f"{len(scored.image.pictures)}"
        )
    for i, caption in enumerate(group.captions):
        length = len(caption.token_ids)
        covered = [t for span in caption.spans for t in range(span.start, span.end)]
        if not all(map(math.isfinite, caption.logprobs)):
            which = caption_name(group, i)
            raise NotFinite(f"{which}: the engine's log-probabilities are not finite", [which])
        if length == 0 or len(caption.logprobs) != length or covered != list(range(length)):
            raise BadBatch(
                f"{name}[{i}]: {length} tokens, {len(caption.logprobs)} log-probabilities, versions of "
                f"{len(covered)} tokens; they must be equal and above 0"
            )
    totals = [parts.total for parts in scored.rewards]
    rewards = [total for total in totals if total is not None]
    if len(rewards) != len(totals):
        raise BadBatch(f"{name}: a caption without a reward must leave its group before the batch is cut")
    wrong = [caption_name(group, i) for i, reward in enumerate(rewards) if not math.isfinite(reward)]
    if wrong:
        raise NotFinite(f"the rewards of {', '.join(wrong)} are not finite", wrong)
    return rewards


def split_updates(
    sequences: Sequence[TrainSequence], updates: int, aggregation: Aggregation, sum_length: int = 1
) -> list[list[TrainSequence]]:
    """Cuts the batch into at most `updates` parts of whole groups, in its order, and weighs them.

    Each part is one optimizer step, so the token weights are those of the part alone.
    """
    groups = [list(members) for _, members in groupby(sequences, key=lambda s: s.group)]
    parts = min(updates, len(groups))
    cuts = [len(groups) * i // parts for i in range(parts + 1)] if parts else []
    result = []
    for start, end in pairwise(cuts):
        part = [s for group in groups[start:end] for s in group]
        weights = token_weights([len(s.caption) for s in part], aggregation, sum_length)
        result.append([replace(s, weight=w) for s, w in zip(part, weights, strict=True)])
    return result
