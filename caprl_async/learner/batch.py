"""From a train batch to what each rank computes: captions as flat sequences, packed into micro-batches.

Every rank makes the same plan from the same batch, so none has to be told its share.
"""

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
    image: ImageRef
    grid: Grid  # (t, h, w) patches as the engine saw them
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


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward pass, captions of one image side by side."""

    sequences: tuple[TrainSequence, ...]

    @property
    def padded_tokens(self) -> int:
        return len(self.sequences) * max(s.length for s in self.sequences)

    @property
    def tokens(self) -> int:
        return sum(s.length for s in self.sequences)


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one update: `ranks[r][i]`; as many for each rank."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    fillers: int  # zero-weight copies that were needed to make it so

    @property
    def padding(self) -> float:
        """Share of the computed tokens that are padding or filler."""
        micros = [micro for rank in self.ranks for micro in rank]
        real = sum(s.length for micro in micros for s in micro.sequences if s.weight)
        return 1.0 - real / sum(micro.padded_tokens for micro in micros)


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
                    image=scored.image,
                    grid=group.image_grid[0],
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
    if len(group.image_grid) != 1:
        raise BadBatch(f"{name}: {len(group.image_grid)} images in one prompt; the learner takes one")
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


# ---------------------------------------------------------------- micro-batches


def make_plan(sequences: Sequence[TrainSequence], ranks: int, token_budget: int) -> Plan:
    """Packs the sequences of one update into equally many micro-batches for each rank.

    Captions of one image stay together except where a rank or a micro-batch is full. A micro-batch holds at
    most `token_budget` padded tokens, or one sequence that alone has more.
    """
    packed = [_pack(share, token_budget) for share in _share(_by_length(sequences), ranks)]
    spare = replace(min(sequences, key=lambda s: s.length), weight=0.0)
    fillers = sum([_even(micros, max(map(len, packed)), spare) for micros in packed])
    for micros in packed:
        # Ranks wait for each other in every micro-batch: like goes with like.
        micros.sort(key=lambda m: -m.padded_tokens)
    return Plan(tuple(tuple(micros) for micros in packed), fillers)


def _even(micros: list[MicroBatch], count: int, spare: TrainSequence) -> int:
    """Brings a rank to `count` micro-batches by splitting the largest; says how many fillers it took."""
    fillers = 0
    while len(micros) < count:
        splittable = [i for i, micro in enumerate(micros) if len(micro.sequences) > 1]
        if splittable:
            largest = max(splittable, key=lambda i: micros[i].tokens)
            micros[largest : largest + 1] = _halve(micros[largest])
        else:
            micros.append(MicroBatch((spare,)))
            fillers += 1
    return fillers


def _by_length(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Groups whole, the longest first, so that neighbours pad each other little."""
    longest: dict[int, int] = {}
    for s in sequences:
        longest[s.group] = max(longest.get(s.group, 0), s.length)
    return sorted(sequences, key=lambda s: (-longest[s.group], s.group, -s.length))


def _share(sequences: Sequence[TrainSequence], ranks: int) -> list[list[TrainSequence]]:
    """Cuts the line of sequences into one piece of equally many tokens for each rank."""
    total = sum(s.length for s in sequences)
    shares: list[list[TrainSequence]] = [[] for _ in range(ranks)]
    before = 0
    for s in sequences:
        middle = before + s.length / 2
        shares[min(ranks - 1, int(middle * ranks / total))].append(s)
        before += s.length
    return shares


def _pack(sequences: Sequence[TrainSequence], token_budget: int) -> list[MicroBatch]:
    """Fills one micro-batch after the other."""
    micros: list[MicroBatch] = []
    held: list[TrainSequence] = []
    for s in sequences:
        if held and max(s.length, *(h.length for h in held)) * (len(held) + 1) > token_budget:
            micros.append(MicroBatch(tuple(held)))
            held = []
        held.append(s)
    if held:
        micros.append(MicroBatch(tuple(held)))
    return micros


def _halve(micro: MicroBatch) -> tuple[MicroBatch, MicroBatch]:
    """Two parts of about equal size, cut between two images if there are several."""
    sequences = micro.sequences
    cuts = range(1, len(sequences))
    between = [i for i in cuts if sequences[i].group != sequences[i - 1].group]
    cut = min(between or cuts, key=lambda i: abs(i - len(sequences) / 2))
    return MicroBatch(sequences[:cut]), MicroBatch(sequences[cut:])
