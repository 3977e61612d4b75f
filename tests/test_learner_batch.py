"""How a train batch becomes sequences and micro-batches."""

from __future__ import annotations

import msgspec
import pytest
from family_kit import captions_of

from caprl_async.config import AdvantageConfig, AdvantageKind, Aggregation, RewardConfig
from caprl_async.learner.batch import (
    BadBatch,
    NotFinite,
    make_sequences,
    split_updates,
    with_advantages,
)
from caprl_async.types import (
    Caption,
    CaptionGroup,
    Finish,
    ImageRef,
    RewardParts,
    ScoredGroup,
    TrainBatch,
    Version,
    VersionSpan,
)

GRID = (1, 4, 4)


def reward(total: float | None) -> RewardParts:
    return RewardParts(total=total, accuracy=total, length=0, format=0, cost=0, scored=1, asked=1)


def scored_group(rewards: list[float | None], number: int = 0) -> ScoredGroup:
    caption = Caption(
        text="a b c",
        token_ids=(7, 8, 9),
        logprobs=(-1.0, -2.0, -3.0),
        spans=(VersionSpan(Version(1, 3), 0, 1), VersionSpan(Version(1, 5), 1, 3)),
        finish=Finish.STOP,
    )
    group = CaptionGroup(
        key=f"train/{number}",
        attempt=1,
        prompt_token_ids=(1, 2, 3, 4),
        image_sha256="x",
        image_grid=((1, 4, 4),),
        captions=(caption,) * len(rewards),
        actor="rollout-0",
        started=0,
        finished=1,
    )
    return ScoredGroup(
        weights=(),
        blind=(),
        group=group,
        verdicts=((),) * len(rewards),
        rewards=tuple(reward(r) for r in rewards),
        index=number,
        row_id="row",
        image=ImageRef(sha256="x", path="/x.png"),
    )


def batch_of(*groups: ScoredGroup) -> TrainBatch:
    return TrainBatch(version=Version(1, 6), groups=groups, cut=0.0)


def test_a_caption_keeps_its_tokens_their_log_probabilities_and_their_age() -> None:
    made = make_sequences(batch_of(scored_group([0.0, 1.0])))
    first, second = with_advantages(made, AdvantageConfig(kind=AdvantageKind.mean), RewardConfig())
    assert first.caption == (7, 8, 9)
    assert first.behaviour == (-1.0, -2.0, -3.0)
    assert first.staleness == (3, 1, 1)
    assert (first.advantage, second.advantage) == (-0.5, 0.5)
    assert second.name == "train/0@1[1]"


def test_groups_of_equal_rewards_are_left_out() -> None:
    made = make_sequences(batch_of(scored_group([0.3, 0.3]), scored_group([0.0, 1.0], 1)))
    sequences = with_advantages(made, AdvantageConfig(kind=AdvantageKind.rloo), RewardConfig())
    assert {s.group for s in sequences} == {1}


def test_contradictions_are_refused_by_name() -> None:
    good = scored_group([0.0, 1.0])
    short = msgspec.structs.replace(good.group.captions[0], logprobs=(-1.0,))
    broken = {
        "without a reward": scored_group([0.0, None]),
        "rewards": msgspec.structs.replace(good, rewards=good.rewards[:1]),
        "row shows": msgspec.structs.replace(good, image=ImageRef(sha256="y", path="/y")),
        "log-probabilities": msgspec.structs.replace(
            good, group=msgspec.structs.replace(good.group, captions=(short, short))
        ),
        "2 pictures were captioned, the row has 1": msgspec.structs.replace(
            good, group=msgspec.structs.replace(good.group, image_grid=((1, 4, 4), (1, 4, 4)))
        ),
    }
    for message, group in broken.items():
        with pytest.raises(BadBatch, match=message) as caught:
            make_sequences(batch_of(group))
        assert "train/0@1" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_name_their_captions(bad: float) -> None:
    with pytest.raises(NotFinite, match=r"train/0@1\[1\]") as caught:
        make_sequences(batch_of(scored_group([0.0, bad])))
    assert caught.value.captions == ("train/0@1[1]",)
    good = scored_group([0.0, 1.0])
    wrong = msgspec.structs.replace(good.group.captions[0], logprobs=(-1.0, bad, -3.0))
    group = msgspec.structs.replace(good.group, captions=(wrong, good.group.captions[1]))
    with pytest.raises(NotFinite) as caught:
        make_sequences(batch_of(msgspec.structs.replace(good, group=group)))
    assert caught.value.captions == ("train/0@1[0]",)


def test_a_caption_with_a_banned_token_is_refused() -> None:
    with pytest.raises(BadBatch, match=r"train/0@1\[0\].*\[8\]"):
        make_sequences(batch_of(scored_group([0.0, 1.0])), banned=(8, 80))


def test_updates_take_whole_groups_and_are_normalised_each() -> None:
    sequences = captions_of([([GRID], 1, [3, 5]), ([GRID], 1, [2, 2]), ([GRID], 1, [9, 1])])
    parts = split_updates(sequences, 2, Aggregation.token_mean)
    assert [sorted({s.group for s in part}) for part in parts] == [[0], [1, 2]]
    for part in parts:
        assert sum(s.weight * len(s.caption) for s in part) == pytest.approx(1)
    assert len(split_updates(sequences, 99, Aggregation.sequence_mean)) == 3
    assert split_updates([], 1, Aggregation.token_mean) == []
