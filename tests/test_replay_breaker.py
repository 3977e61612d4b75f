"""Judges that fail hold admission back, are tried one piece at a time, and in the end stop the run."""

from __future__ import annotations

import pytest

from caprl_async.config import ReplayConfig
from caprl_async.replay.breaker import Breaker, JudgesDown


def breaker(**values: float) -> tuple[Breaker, list[str]]:
    said: list[str] = []
    config = ReplayConfig(**{"judge_failures": 3, "judge_outage_s": 100.0, **values})
    return Breaker(config, "judge", lambda _, text: said.append(text)), said


def fail(it: Breaker, now: float) -> None:
    it.given()
    it.failed("it hung", now)


def test_it_opens_at_failures_in_a_row_and_an_answer_starts_the_count_again() -> None:
    it, said = breaker()
    for now in (1.0, 2.0):
        fail(it, now)
    it.given()
    it.answered()
    for now in (3.0, 4.0):
        fail(it, now)
    assert not it.is_open
    fail(it, 5.0)
    assert it.is_open
    assert len(said) == 1
    assert "it hung" in said[0]


def test_open_it_lets_one_trial_through_and_closes_at_its_answer() -> None:
    it, said = breaker()
    for now in (1.0, 1.0, 1.0):
        fail(it, now)
    assert not it.may_give(1.1)
    assert it.may_give(1.6)
    it.given()
    assert not it.may_give(50.0)  # one at a time
    it.failed("again", 50.0)
    assert not it.may_give(50.9)  # the pause has doubled
    assert it.may_give(51.0)
    it.given()
    it.answered()
    assert not it.is_open
    assert it.may_give(51.0)
    assert "again" in said[-1]
    assert len(said) == 2


def test_work_given_before_it_opened_counts_as_a_trial() -> None:
    it, _ = breaker()
    it.given()
    for now in (1.0, 1.0, 1.0):
        fail(it, now)
    assert not it.may_give(9.0)
    it.answered()
    assert not it.is_open


def test_an_outage_has_a_budget_and_the_message_says_what_to_do() -> None:
    it, _ = breaker()
    it.nobody(10.0)
    it.check(109.0)
    with pytest.raises(JudgesDown, match=r"101 s: no judge is alive.*resume=true.*replay\.judge_outage_s"):
        it.check(111.0)


def test_with_nothing_to_try_work_flows_again_but_the_budget_is_not_forgotten() -> None:
    it, _ = breaker()
    it.nobody(0.0)
    it.relent(60.0)
    assert not it.is_open
    it.check(1000.0)  # idle time is no outage
    fail(it, 1000.0)
    assert it.is_open  # at once
    it.check(1039.0)
    with pytest.raises(JudgesDown):
        it.check(1041.0)
    it.given()
    it.answered()
    it.nobody(2000.0)
    it.check(2099.0)


def test_withdrawn_work_is_no_trial() -> None:
    it, _ = breaker()
    it.given()
    it.nobody(0.0)
    assert not it.may_give(5.0)
    it.withdrawn()
    assert it.may_give(5.0)
