"""Judges that fail hold admission back, are tried one piece at a time, and in the end stop the run."""

from __future__ import annotations

from typing import Any

import pytest

from caprl_async.config import ReplayConfig
from caprl_async.replay.breaker import Breaker, JudgesDown
from caprl_async.replay.work import JudgeWork


def work() -> JudgeWork:
    owner: Any = None
    return JudgeWork(owner, "train/0", 0, ("a caption",), (), 0, "judge")


def breaker(**values: float) -> tuple[Breaker, list[str]]:
    said: list[str] = []
    config = ReplayConfig(**{"judge_failures": 3, "judge_outage_s": 100.0, **values})
    return Breaker(config, "judge", lambda _, text: said.append(text)), said


def fail(it: Breaker, now: float, reason: str = "it hung") -> None:
    mine = work()
    it.given(mine)
    it.failed(mine, reason, now)


def answer(it: Breaker) -> None:
    mine = work()
    it.given(mine)
    it.answered(mine)


def test_it_opens_at_failures_in_a_row_and_an_answer_starts_the_count_again() -> None:
    it, said = breaker()
    for now in (1.0, 2.0):
        fail(it, now)
    answer(it)
    for now in (3.0, 4.0):
        fail(it, now)
    assert not it.is_open
    fail(it, 5.0)
    assert it.is_open
    assert len(said) == 1
    assert "it hung" in said[0]


def test_work_that_is_lost_at_one_moment_is_one_failure() -> None:
    it, _ = breaker()
    for _ in range(8):  # all that a dead judge held
        fail(it, 1.0)
    assert not it.is_open
    fail(it, 2.0)
    fail(it, 3.0)
    assert it.is_open
    assert it.may_give(3.5)  # the pause has not grown


def test_open_it_lets_one_trial_through_and_closes_at_its_answer() -> None:
    it, said = breaker()
    for now in (1.0, 1.1, 1.2):
        fail(it, now)
    assert not it.may_give(1.6)
    assert it.may_give(1.7)
    trial = work()
    it.given(trial)
    assert not it.may_give(50.0)  # one at a time
    it.failed(trial, "again", 50.0)
    assert not it.may_give(50.9)  # the pause has doubled
    assert it.may_give(51.0)
    answer(it)
    assert not it.is_open
    assert len(said) == 2
    assert "answer again" in said[-1]
    for now in (60.0, 61.0, 62.0):
        fail(it, now)
    assert it.may_give(62.5)  # and begins again


def test_work_that_hangs_since_before_does_not_keep_others_from_trying() -> None:
    it, _ = breaker()
    old = work()
    it.given(old)
    for now in (1.0, 2.0, 3.0):
        fail(it, now)
    assert it.may_give(9.0)
    it.given(work())
    it.failed(old, "too late", 9.5)
    assert not it.may_give(50.0)  # the trial is still out
    it.answered(old)
    assert not it.is_open


def test_an_outage_has_a_budget_from_its_first_failure_and_the_message_says_what_to_do() -> None:
    it, _ = breaker()
    it.nobody(10.0)
    it.check(109.0)
    with pytest.raises(JudgesDown, match=r"101 s: no judge is alive.*resume=true.*replay\.judge_outage_s"):
        it.check(111.0)
    it, _ = breaker()
    for now in (10.0, 60.0, 90.0):
        fail(it, now)
    with pytest.raises(JudgesDown, match="101 s: it hung"):
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
    assert it.outages == 1
    answer(it)
    it.nobody(2000.0)
    it.check(2099.0)
    assert it.outages == 2


def test_withdrawn_work_is_no_trial() -> None:
    it, _ = breaker()
    it.nobody(0.0)
    trial = work()
    it.given(trial)
    assert not it.may_give(5.0)
    it.withdrawn(trial)
    assert it.may_give(5.0)
