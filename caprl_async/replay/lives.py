"""One training prompt: how it is made from a row, and how verdicts turn its captions into a scored group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from caprl_async.config import Blind, Config
from caprl_async.data.rows import Row
from caprl_async.judge.monitors import Missing
from caprl_async.replay.work import Verdicts
from caprl_async.reward.allocation import Allotted, Spreads, allot, weighed
from caprl_async.reward.reward import counted_weights, reward_parts, term_values, term_weights
from caprl_async.types import (
    CaptionGroup,
    ImageRef,
    Prompt,
    Purpose,
    Question,
    RewardParts,
    Sampling,
    ScoredGroup,
    TrainBatch,
    Verdict,
)


@dataclass(frozen=True)
class Prepared:
    """A row in the sampler's order whose image lies in the store, or could not be put there."""

    index: int
    row: Row
    image: ImageRef | None
    error: str = ""


@dataclass
class Life:
    """One admitted prompt that has not ended."""

    prompt: Prompt
    row: Row
    asked: Allotted
    failures: int = 0
    downs: int = 0  # how often its judge failed, whoever was to blame
    judged_then: int | None = None  # groups that had been answered when it last did
    not_before: float = 0.0
    group: CaptionGroup | None = None

    @property
    def questions(self) -> tuple[Question, ...]:
        return self.asked.questions


@dataclass(frozen=True)
class Judgement:
    """What verdicts make of a group: `scored` is None if fewer than `min_group` captions have a reward."""

    scored: ScoredGroup | None
    missing: tuple[Missing, ...]  # of all captions, those without a reward too
    parts: tuple[RewardParts, ...]  # likewise


@dataclass(frozen=True)
class Cut:
    """The batch of one version, kept until the next is asked for."""

    batch: TrainBatch
    reply: bytes  # the encoded BatchReply: the same for every rank, however often it asks
    questions: tuple[tuple[Question, ...], ...]  # of each group


def new_life(prepared: Prepared, attempt: int, config: Config, spreads: Spreads | None) -> Life:
    """The prompt of a row; its questions stay here and never reach a rollout."""
    rollout = config.rollout
    prompt = Prompt(
        key=f"train/{prepared.index}",
        index=prepared.index,
        attempt=attempt,
        row_id=prepared.row.row_id,
        image=prepared.image or ImageRef(sha256="", path=""),
        text=config.data.prompt or prepared.row.prompt,
        sampling=Sampling(
            n=rollout.group_size, temperature=rollout.temperature, max_tokens=rollout.max_tokens
        ),
        purpose=Purpose.TRAIN,
    )
    asked = allot(
        weighed(prepared.row.questions, config.reward.absent),
        config.data.questions_per_image,
        f"{config.seed}/{prepared.index}",
        spreads,
    )
    return Life(prompt, prepared.row, asked)


def captions_to_judge(life: Life, config: Config) -> tuple[str, ...]:
    """The captions of a group as the judge gets them; with `reward.blind` an empty one stands before them."""
    assert life.group is not None, "nothing to judge yet"
    texts = tuple(caption.text for caption in life.group.captions)
    return texts if config.reward.blind is Blind.off else ("", *texts)


def score_group(life: Life, verdicts: Verdicts, config: Config) -> Judgement:
    """The group's rewards from verdicts on `captions_to_judge`; captions without one have left it."""
    group = life.group
    assert group is not None, "verdicts on a prompt without captions"
    blind: tuple[Verdict, ...] = ()
    if config.reward.blind is not Blind.off:
        blind, *rest = verdicts
        verdicts = tuple(rest)
    weights = counted_weights(life.questions, blind, config.reward)
    parts = tuple(
        reward_parts(
            row,
            life.questions,
            weights,
            tokens=len(caption.token_ids),
            text=caption.text,
            config=config.reward,
            scale=life.asked.scale,
        )
        for caption, row in zip(group.captions, verdicts, strict=True)
    )
    missing = tuple(
        Missing(tokens=len(caption.token_ids), asked=p.asked, scored=p.scored, accuracy=p.accuracy)
        for caption, p in zip(group.captions, parts, strict=True)
    )
    kept = [position for position, part in enumerate(parts) if part.total is not None]
    if len(kept) < config.replay.min_group:
        return Judgement(None, missing, parts)
    scored = ScoredGroup(
        group=msgspec.structs.replace(group, captions=tuple(group.captions[i] for i in kept)),
        verdicts=tuple(verdicts[i] for i in kept),
        rewards=tuple(parts[i] for i in kept),
        weights=weights,
        blind=blind,
        index=life.prompt.index,
        row_id=life.row.row_id,
        image=life.prompt.image,
    )
    return Judgement(scored, missing, parts)


def spread(rewards: Sequence[RewardParts], config: Config) -> float:
    """How far a group's rewards lie apart; where each term has an advantage of its own, the widest term."""
    if not config.learner.advantage.per_term:
        totals = [parts.total for parts in rewards if parts.total is not None]
        return max(totals) - min(totals)
    columns = zip(*(term_values(parts) for parts in rewards), strict=True)
    return max(
        abs(weight) * (max(column) - min(column))
        for weight, column in zip(term_weights(config.reward), columns, strict=True)
    )


def totals(scored: ScoredGroup) -> list[float]:
    """The rewards of a scored group's captions."""
    return [parts.total for parts in scored.rewards if parts.total is not None]


def pop_due(waiting: list[Life], now: float, wanted: Callable[[Life], bool] = lambda _: True) -> Life | None:
    """Takes the first wanted prompt whose time has come out of a list."""
    for position, life in enumerate(waiting):
        if life.not_before <= now and wanted(life):
            return waiting.pop(position)
    return None
