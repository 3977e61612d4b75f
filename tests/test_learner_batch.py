"""How a train batch becomes sequences and micro-batches."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.config import AdvantageConfig, AdvantageKind, Aggregation, RewardConfig
from caprl_async.learner.batch import (
    BadBatch,
    NotFinite,
    Plan,
    TrainSequence,
    make_plan,
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
        "images in one prompt": msgspec.structs.replace(
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


def sequence(group: int, number: int, prompt: int, caption: int) -> TrainSequence:
    return TrainSequence(
        name=f"{group}[{number}]",
        group=group,
        image=ImageRef(sha256=str(group), path=""),
        grid=(1, 4, 4),
        prompt=(1,) * prompt,
        caption=(2,) * caption,
        behaviour=(-1.0,) * caption,
        staleness=(0,) * caption,
        reward=0.0,
        advantage=1.0,
        weight=0.1,
    )


groups = st.lists(
    st.tuples(st.integers(4, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8)),
    min_size=1,
    max_size=10,
)


def sequences_of(shapes: list[tuple[int, list[int]]]) -> list[TrainSequence]:
    return [
        sequence(group, i, prompt, caption)
        for group, (prompt, captions) in enumerate(shapes)
        for i, caption in enumerate(captions)
    ]


@given(groups, st.integers(1, 4), st.integers(30, 600))
def test_each_caption_is_computed_once_and_ranks_keep_in_step(
    shapes: list[tuple[int, list[int]]], ranks: int, budget: int
) -> None:
    sequences = sequences_of(shapes)
    plan = make_plan(sequences, ranks, budget)
    assert len(plan.ranks) == ranks
    assert len({len(rank) for rank in plan.ranks}) == 1
    trained = Counter(s.name for rank in plan.ranks for micro in rank for s in micro.sequences if s.weight)
    assert trained == Counter(s.name for s in sequences)
    fillers = [s for rank in plan.ranks for micro in rank for s in micro.sequences if not s.weight]
    assert len(fillers) == plan.fillers
    for rank in plan.ranks:
        for micro in rank:
            assert micro.padded_tokens <= budget or len(micro.sequences) == 1


def tokens_of(plan: Plan) -> list[int]:
    return [sum(micro.tokens for micro in rank) for rank in plan.ranks]


@given(groups, st.integers(2, 4))
def test_ranks_get_equal_work_to_within_one_caption(shapes: list[tuple[int, list[int]]], ranks: int) -> None:
    sequences = sequences_of(shapes)
    plan = make_plan(sequences, ranks, 10_000)
    if not plan.fillers:
        tokens = tokens_of(plan)
        assert max(tokens) - min(tokens) <= 2 * max(s.length for s in sequences)


@given(groups, st.integers(1, 4))
def test_an_image_is_split_over_ranks_only_at_their_borders(
    shapes: list[tuple[int, list[int]]], ranks: int
) -> None:
    plan = make_plan(sequences_of(shapes), ranks, 10_000)
    if not plan.fillers:
        places = [s.group for rank in plan.ranks for micro in rank for s in micro.sequences]
        if all(len(rank) == 1 for rank in plan.ranks):
            borders = sum(a != b for a, b in itertools.pairwise(places))
            assert borders == len(set(places)) - 1


def test_a_filler_is_needed_only_when_captions_are_fewer_than_ranks() -> None:
    two = sequences_of([(4, [3, 3])])
    assert make_plan(two, 2, 100).fillers == 0
    assert make_plan(two, 3, 100).fillers == 1


def test_updates_take_whole_groups_and_are_normalised_each() -> None:
    sequences = sequences_of([(4, [3, 5]), (4, [2, 2]), (4, [9, 1])])
    parts = split_updates(sequences, 2, Aggregation.token_mean)
    assert [sorted({s.group for s in part}) for part in parts] == [[0], [1, 2]]
    for part in parts:
        assert sum(s.weight * len(s.caption) for s in part) == pytest.approx(1)
    assert len(split_updates(sequences, 99, Aggregation.sequence_mean)) == 3
    assert split_updates([], 1, Aggregation.token_mean) == []
