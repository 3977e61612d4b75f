"""One training prompt: how it is made from a row, and how verdicts turn its captions into a scored group."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

from caprl_async.config import Config
from caprl_async.data.rows import Row
from caprl_async.replay.work import Verdicts
from caprl_async.reward.reward import reward_parts
from caprl_async.types import (
    CaptionGroup,
    ImageRef,
    Prompt,
    Purpose,
    Question,
    Sampling,
    ScoredGroup,
    TrainBatch,
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
    questions: tuple[Question, ...]
    failures: int = 0
    not_before: float = 0.0
    group: CaptionGroup | None = None


@dataclass(frozen=True)
class Cut:
    """The batch of one version, kept until the next is asked for."""

    batch: TrainBatch
    reply: bytes  # the encoded BatchReply: the same for every rank, however often it asks
    questions: tuple[tuple[Question, ...], ...]  # of each group


def new_life(prepared: Prepared, attempt: int, config: Config) -> Life:
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
    questions = draw_questions(
        prepared.row.questions, config.data.questions_per_image, config.seed, prepared.index
    )
    return Life(prompt, prepared.row, questions)


def draw_questions(
    questions: tuple[Question, ...], wanted: int, seed: int, index: int
) -> tuple[Question, ...]:
    """`wanted` of a row's questions (0: all) in their order; the same for every attempt of a prompt."""
    if not wanted or wanted >= len(questions):
        return questions
    drawn = random.Random(f"{seed}/{index}").sample(range(len(questions)), wanted)
    return tuple(questions[position] for position in sorted(drawn))


def score_group(life: Life, verdicts: Verdicts, config: Config) -> ScoredGroup | None:
    """The group's rewards; captions without one have left it. None: fewer than `min_group` are left."""
    group = life.group
    assert group is not None, "verdicts on a prompt without captions"
    weights = [question.weight for question in life.questions]
    parts = [
        reward_parts(row, weights, tokens=len(caption.token_ids), text=caption.text, config=config.reward)
        for caption, row in zip(group.captions, verdicts, strict=True)
    ]
    kept = [position for position, part in enumerate(parts) if part.total is not None]
    if len(kept) < config.replay.min_group:
        return None
    return ScoredGroup(
        group=msgspec.structs.replace(group, captions=tuple(group.captions[i] for i in kept)),
        verdicts=tuple(verdicts[i] for i in kept),
        rewards=tuple(parts[i] for i in kept),
        index=life.prompt.index,
        row_id=life.row.row_id,
        image=life.prompt.image,
    )


def totals(scored: ScoredGroup) -> list[float]:
    """The rewards of a scored group's captions."""
    return [parts.total for parts in scored.rewards if parts.total is not None]


def pop_due(waiting: list[Life], now: float) -> Life | None:
    """Takes the first prompt whose time has come out of a list."""
    for position, life in enumerate(waiting):
        if life.not_before <= now:
            return waiting.pop(position)
    return None
