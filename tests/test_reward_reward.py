"""Missing is never zero, and the terms are the formulas of the papers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.config import Blind, RewardConfig
from caprl_async.reward.reward import counted_weights, format_term, length_term, reward_parts
from caprl_async.types import Outcome, Question, QuestionKind, RewardParts, Verdict

scores = st.floats(0, 1)
missing = st.sampled_from([Outcome.UNSCORABLE, Outcome.JUDGE_DOWN])


def scored(score: float, draws: int = 1) -> Verdict:
    return Verdict(question_id="q", outcome=Outcome.SCORED, score=score, draws=draws)


def lacking(outcome: Outcome) -> Verdict:
    return Verdict(question_id="q", outcome=outcome, draws=0 if outcome is Outcome.NOT_ASKED else 1)


def question(kind: QuestionKind = QuestionKind.FACT, weight: float = 1.0) -> Question:
    answer = 0 if kind is QuestionKind.FACT else None
    return Question(question_id="q", stem="?", choices=("a", "b"), answer=answer, kind=kind, weight=weight)


def parts(
    verdicts: list[Verdict],
    weights: list[float] | None = None,
    config: RewardConfig | None = None,
    **more: int,
) -> RewardParts:
    return reward_parts(
        verdicts,
        [question()] * len(verdicts),
        weights or [1.0] * len(verdicts),
        tokens=more.get("tokens", 10),
        text="",
        config=config or RewardConfig(),
    )


@given(st.lists(scores, min_size=1, max_size=8), st.lists(missing, max_size=8))
def test_what_is_missing_changes_no_accuracy(known: list[float], gaps: list[Outcome]) -> None:
    result = parts([*map(scored, known), *map(lacking, gaps)])
    assert result.accuracy == pytest.approx(sum(known) / len(known))
    enough = len(known) >= 0.5 * (len(known) + len(gaps))
    assert (result.total is not None) == enough
    if enough:
        assert result.total == result.accuracy
    assert (result.scored, result.asked) == (len(known), len(known) + len(gaps))


@given(st.lists(missing, max_size=5))
def test_without_any_score_there_is_no_reward(gaps: list[Outcome]) -> None:
    for quorum in (0.0, 0.5):
        result = parts([lacking(gap) for gap in gaps], config=RewardConfig(quorum=quorum, length=1.0))
        assert result.total is None
        assert result.accuracy is None


@given(st.lists(st.tuples(scores, st.floats(0.1, 10)), min_size=1, max_size=6))
def test_questions_weigh_what_they_weigh(pairs: list[tuple[float, float]]) -> None:
    result = parts([scored(score) for score, _ in pairs], [weight for _, weight in pairs])
    expected = sum(score * weight for score, weight in pairs) / sum(weight for _, weight in pairs)
    assert result.accuracy == pytest.approx(expected)


def test_sampled_draws_weigh_equally_and_what_was_not_drawn_does_not_count() -> None:
    result = parts([scored(1.0, draws=3), scored(0.0, draws=1), lacking(Outcome.NOT_ASKED)])
    assert result.accuracy == pytest.approx(0.75)
    assert result.asked == 2


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_length_term_falls_from_one_to_zero(one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert 1.0 >= length_term(short, 2048, 3072) >= length_term(long, 2048, 3072) >= 0.0
    assert length_term(2048, 2048, 3072) == 1.0
    assert length_term(2560, 2048, 3072) == 0.5
    assert length_term(3072, 2048, 3072) == 0.0
    assert length_term(5, 4, 4) == 0.0


def test_terms_are_weighed_together() -> None:
    config = RewardConfig(accuracy=2.0, length=0.2, length_free=10, length_max=20)
    result = parts([scored(0.5)], config=config, tokens=15)
    assert result.total == pytest.approx(2 * 0.5 + 0.2 * 0.5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no stamps", 0.0),
        ("[00:01] a [00:05 - 00:09] b", 1.0),
        ("[00:05] a [00:01] b", 0.5),
        ("[00:01] a [00:75] b", 0.75),
        ("[00:09 - 00:05] a", 0.0),
        ("[1:2:3] a [00:01] b", 0.75),
    ],
)
def test_format_term(text: str, value: float) -> None:
    assert format_term(text) == pytest.approx(value)


def test_length_costs_at_any_length_when_asked() -> None:
    config = RewardConfig(length_cost=2.0)
    short, long = (parts([scored(0.5)], config=config, tokens=n) for n in (10, 110))
    assert short.total == pytest.approx(0.5 - 0.02)
    assert short.total - long.total == pytest.approx(0.2)
    assert parts([scored(0.5)], tokens=110).total == 0.5


def test_kinds_of_questions_have_accuracies_of_their_own() -> None:
    questions = [question(), question(QuestionKind.ABSENT), question(QuestionKind.ABSENT)]
    verdicts = [scored(0.25), scored(1.0), scored(0.5)]
    found = reward_parts(
        verdicts, questions, [1.0, 2.0, 0.0], tokens=5, text="", config=RewardConfig(), scale=1.5
    )
    assert (found.fact, found.absent) == (0.25, 1.0)
    assert found.accuracy == pytest.approx(1.5 * (0.25 + 2 * 1.0) / 3)
    assert (found.scored, found.asked) == (2, 2)  # of weight 0: not counted at all


@pytest.mark.parametrize(
    ("blind", "expected"),
    [
        (RewardConfig(), (3.0, 1.0, 1.0, 2.0)),
        (RewardConfig(blind=Blind.drop, blind_limit=0.5), (0.0, 1.0, 1.0, 2.0)),
        (RewardConfig(blind=Blind.weigh), (pytest.approx(0.3), 0.75, 1.0, 2.0)),
    ],
)
def test_questions_that_need_no_caption_lose_weight(blind: RewardConfig, expected: tuple[float, ...]) -> None:
    """Not those about absent things, right without one by design, nor those that were not measured."""
    questions = [question(weight=3.0), question(), question(QuestionKind.ABSENT), question(weight=2.0)]
    without = [scored(0.9), scored(0.25), scored(1.0), lacking(Outcome.UNSCORABLE)]
    assert counted_weights(questions, without, blind) == expected
