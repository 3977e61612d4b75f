"""Drawing some of an image's questions leaves the reward's expectation where asking all of them puts it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.reward.allocation import Spreads, allot, inclusion, weighed
from caprl_async.types import Outcome, Question, QuestionKind, Verdict

weights = st.lists(st.floats(0.05, 20), min_size=2, max_size=9)


def questions(given_weights: list[float]) -> list[Question]:
    return [
        Question(question_id=f"q{i}", stem="?", choices=("a", "b"), answer=0, weight=weight)
        for i, weight in enumerate(given_weights)
    ]


def scored(*scores: float) -> list[Verdict]:
    return [Verdict(question_id="q", outcome=Outcome.SCORED, score=score) for score in scores]


@given(weights, st.data())
def test_chances_follow_the_wishes_and_add_up(wishes: list[float], data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, len(wishes) - 1))
    chances = inclusion(wishes, wanted)
    assert math.fsum(chances) == pytest.approx(wanted)
    assert max(chances) <= 1.0
    free = [(wish, chance) for wish, chance in zip(wishes, chances, strict=True) if chance < 1.0]
    assert all(chance / wish == pytest.approx(free[0][1] / free[0][0]) for wish, chance in free)


@given(weights, st.data(), st.text(max_size=5))
def test_as_many_are_drawn_as_wanted_in_their_order(
    given_weights: list[float], data: st.DataObject, seed: str
) -> None:
    asked = questions(given_weights)
    wanted = data.draw(st.integers(1, len(asked) - 1))
    drawn = allot(asked, wanted, seed)
    names = [q.question_id for q in drawn.questions]
    assert len(set(names)) == wanted
    assert names == sorted(names)
    assert drawn == allot(asked, wanted, seed)
    # Drawn by weight alone, what was drawn stands for all of the weight.
    assert math.fsum(q.weight for q in drawn.questions) == pytest.approx(math.fsum(given_weights))
    assert drawn.scale == pytest.approx(1.0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_mean_over_draws_is_the_weighted_mean_over_all(adaptive: bool) -> None:
    asked = questions([1.0, 1.0, 5.0, 0.5, 2.0])
    scores = {"q0": 0.9, "q1": 0.1, "q2": 0.4, "q3": 1.0, "q4": 0.0}
    spreads = None
    if adaptive:
        spreads = Spreads()
        spreads.learn(asked, [scored(0.0, 0.5, 0.4, 0.0, 0.3), scored(1.0, 0.5, 0.4, 0.1, 0.6)])
    truth = sum(q.weight * scores[q.question_id] for q in asked) / sum(q.weight for q in asked)
    found, often = [], dict.fromkeys(scores, 0)
    for i in range(20_000):
        drawn = allot(asked, 2, f"seed/{i}", spreads)
        weight = math.fsum(q.weight for q in drawn.questions)
        mean = math.fsum(q.weight * scores[q.question_id] for q in drawn.questions) / weight
        found.append(drawn.scale * mean)
        for q in drawn.questions:
            often[q.question_id] += 1
    deviation = (sum((x - truth) ** 2 for x in found) / len(found)) ** 0.5
    assert abs(sum(found) / len(found) - truth) < 4.5 * deviation / len(found) ** 0.5
    if adaptive:  # the question on which captions differ most is asked more often than its equal
        assert often["q0"] > 2 * often["q1"]
    else:
        assert often["q0"] == pytest.approx(often["q1"], rel=0.1)


def test_few_questions_are_all_asked() -> None:
    asked = questions([1.0, 2.0])
    assert allot(asked, 0, "s").questions == allot(asked, 2, "s").questions == tuple(asked)


def test_questions_about_absent_things_have_a_factor_of_their_own() -> None:
    absent = Question(
        question_id="n", stem="?", choices=("a",), answer=None, kind=QuestionKind.ABSENT, weight=2.0
    )
    (fact,) = questions([3.0])
    assert [q.weight for q in weighed([fact, absent], 1.5)] == [3.0, 3.0]
    assert weighed([fact, absent], 0.0) == (fact,)


def test_what_was_learnt_goes_into_a_checkpoint_and_back() -> None:
    asked = questions([1.0, 1.0])
    spreads = Spreads()
    spreads.learn(asked, [scored(0.0, 0.5), scored(1.0, 0.5)])
    spreads.learn(asked, [scored(0.3, 0.5)])  # one caption has no spread
    assert Spreads(spreads.state()).deviations(asked) == spreads.deviations(asked)
    high, low = spreads.deviations(asked)
    assert (high, low) == (pytest.approx(0.6), pytest.approx(0.1))
