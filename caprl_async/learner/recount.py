"""Rewards and advantages of a recorded batch, computed again from its captions and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from caprl_async.config import Config, KLPlace
from caprl_async.learner.batch import caption_name, make_sequences, with_advantages
from caprl_async.reward.reward import TERMS, counted_weights, reward_parts
from caprl_async.types import Question, QuestionKind, RewardParts, ScoredGroup, TrainBatch, Verdict

_CLOSE = 1e-9  # the same numbers in the same order; `scale` alone is got by a division
_TOLD = 1e-6  # the ledger keeps six places of an advantage

Told = Mapping[str, Sequence[float]]
"""By prompt key: the advantages of its captions as the learner told them."""


def differences(
    batch: TrainBatch, questions: Mapping[str, tuple[Question, ...]], told: Told, config: Config
) -> list[str]:
    """What comes out otherwise than recorded, in words.

    Args:
        questions: by prompt key, where they are known: weights and kinds are checked only there.
    """
    found: list[str] = []
    groups = []
    for scored in batch.groups:
        parts, wrong = _again(scored, questions.get(scored.group.key), config)
        found += wrong
        groups.append(replace(scored, rewards=parts))
    if any(parts.total is None for scored in groups for parts in scored.rewards):
        return found  # without a reward there is no advantage
    known = advantages(replace(batch, groups=tuple(groups)), config)
    return found + told_otherwise(batch, known, told) if known is not None else found


def advantages(batch: TrainBatch, config: Config) -> dict[str, float] | None:
    """By caption; those left out of training are not in it. None if they depend on the reference model."""
    kl = config.learner.kl
    if kl.coef and kl.place is KLPlace.reward:
        return None
    sequences = with_advantages(make_sequences(batch), config.learner.advantage, config.reward)
    return {sequence.name: sequence.advantage for sequence in sequences}


def told_otherwise(batch: TrainBatch, known: Mapping[str, float], told: Told) -> list[str]:
    """Where the advantages that the learner told of this batch are not these."""
    found = []
    for scored in batch.groups:
        for number, before in enumerate(told.get(scored.group.key, ())):
            name = caption_name(scored.group, number)
            now = known.get(name, 0.0)
            if abs(now - before) > _TOLD:
                found.append(f"{name}: advantage {before:g}, computed again {now:g}")
    return found


def _again(
    scored: ScoredGroup, questions: tuple[Question, ...] | None, config: Config
) -> tuple[tuple[RewardParts, ...], list[str]]:
    """The rewards of a group, and what is different about them."""
    group = scored.group
    name = f"{group.key}@{group.attempt}"
    found: list[str] = []
    if questions is None:
        asked, weights = _stand_ins(scored.verdicts[0]), scored.weights
    else:
        asked, weights = questions, counted_weights(questions, scored.blind, config.reward)
        if not all(map(_close, weights, scored.weights)):
            found.append(f"{name}: weights of the questions {scored.weights}, computed again {weights}")

    def rewards(scale: float) -> tuple[RewardParts, ...]:
        return tuple(
            reward_parts(
                verdicts,
                asked,
                weights,
                tokens=len(caption.token_ids),
                text=caption.text,
                config=config.reward,
                scale=scale,
            )
            for caption, verdicts in zip(group.captions, scored.verdicts, strict=True)
        )

    parts = rewards(1.0)
    if config.data.questions_per_image:
        parts = rewards(_scale(parts, scored.rewards))
    fields = ("total", *TERMS, "scored", "asked", *(("fact", "absent") if questions is not None else ()))
    for number, (now, before) in enumerate(zip(parts, scored.rewards, strict=True)):
        found += [
            f"{caption_name(group, number)}: {field} {getattr(before, field)}, "
            f"computed again {getattr(now, field)}"
            for field in fields
            if not _close(getattr(now, field), getattr(before, field))
        ]
    return parts, found


def _stand_ins(verdicts: Sequence[Verdict]) -> tuple[Question, ...]:
    """For questions that are not known any more; the reward does not depend on what they were about."""
    return tuple(
        Question(question_id=v.question_id, stem="", choices=(), answer=None, kind=QuestionKind.FACT)
        for v in verdicts
    )


def _scale(unscaled: Sequence[RewardParts], recorded: Sequence[RewardParts]) -> float:
    """What drawn questions count in all of a group's captions: one number must explain every accuracy."""
    for now, before in zip(unscaled, recorded, strict=True):
        if now.accuracy and before.accuracy is not None:
            return before.accuracy / now.accuracy
    return 1.0


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)
