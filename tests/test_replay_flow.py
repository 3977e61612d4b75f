"""The queue's rules under any order of completions, failures, stale and filtered groups."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_kit import group, unscored, verdicts

from caprl_async.config import Config
from caprl_async.data.rows import Row
from caprl_async.replay.admission import capacity, may_caption
from caprl_async.replay.events import LedgerError
from caprl_async.replay.flow import Prepared, TrainFlow
from caprl_async.replay.ledger import Ledger
from caprl_async.replay.staleness import fresh
from caprl_async.replay.tally import NothingToTrain
from caprl_async.replay.work import GenerateWork, JudgeWork
from caprl_async.types import FOREIGN, ImageRef, Outcome, Question, Version

QUESTIONS = (
    Question(question_id="q0", stem="a ?", choices=("x", "y"), answer=0),
    Question(question_id="q1", stem="b ?", choices=("x", "y"), answer=None),
)


class World:
    """A flow with an engine and a judge that do what a script of small numbers says."""

    def __init__(self, folder: Path, *, max_staleness: int, batch_groups: int, max_attempts: int = 3) -> None:
        config = Config()
        config.rollout.group_size = 3
        config.replay.max_staleness = max_staleness
        config.replay.batch_groups = batch_groups
        config.replay.max_attempts = max_attempts
        config.replay.max_evicted_batches = 1e9
        self.config = config
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.flow = TrainFlow(config, self.ledger, lambda source, text: None)
        self.flow.is_open = True
        self.now = 0.0
        self.generating: list[tuple[GenerateWork, Version]] = []
        self.judging: list[JudgeWork] = []
        self.batches: list[list[int]] = []
        self.failures = True  # whether anything may fail

    def step(self, choice: int) -> None:
        """One thing happens somewhere in the ring."""
        self.now += 10.0
        flow = self.flow
        while flow.wants_prepared:
            index = flow.next_wanted
            row = Row(f"row-{index}", b"", "", QUESTIONS)
            image = None if self.failures and index % 11 == 7 else ImageRef(sha256=str(index), path="")
            flow.offer(Prepared(index, row, image, "broken"))
        action, which = choice % 4, choice // 4
        if action == 0:
            engine = Version(flow.version.epoch, max(0, flow.version.step - which % 3))
            work = flow.next_generate("rollout-0", engine, self.now)
            if work is not None:
                self.generating.append((work, engine))
        elif action == 1 and self.generating:
            self._captions(which)
        elif action == 2:
            self._verdicts(which)
        elif action == 3:
            self._learn()
        assert flow.capacity >= 0

    def _captions(self, which: int) -> None:
        work, engine = self.generating.pop(which % len(self.generating))
        if self.failures and which % 7 == 3:
            self.flow.failed(work, "no memory", self.now)
        elif self.failures and which % 7 == 4:
            self.flow.failed(work, "died", self.now, lost=True)
        else:
            self.flow.generated(work, group(work.prompt, engine, self.flow.version), self.now)

    def _verdicts(self, which: int) -> None:
        work = self.flow.next_judge("judge-0", "judge", self.now)
        if work is not None:
            self.judging.append(work)
        if not self.judging:
            return
        work = self.judging.pop(which % len(self.judging))
        n = len(work.captions)
        kind = which % 9 if self.failures else 0
        if kind == 1:
            self.flow.failed(work, "timeout", self.now)
        elif kind == 2:
            self.flow.judged(work, unscored(QUESTIONS, n, Outcome.JUDGE_DOWN), self.now)
        elif kind == 3:
            self.flow.judged(work, unscored(QUESTIONS, n, Outcome.UNSCORABLE), self.now)
        elif kind == 4:
            self.flow.judged(work, (verdicts(QUESTIONS, n)[1],) * n, self.now)  # no spread
        else:
            self.flow.judged(work, verdicts(QUESTIONS, n), self.now)

    def _learn(self) -> None:
        version = self.flow.version
        cut = self.flow.cut(version, self.now)
        if cut is None:
            return
        assert self.flow.cut(version, self.now) is cut
        assert len(cut.batch.groups) == self.config.replay.batch_groups
        for scored in cut.batch.groups:
            oldest = scored.group.oldest
            assert version.step - self.config.replay.max_staleness <= oldest.step <= version.step
        self.batches.append([scored.index for scored in cut.batch.groups])
        self.flow.advance(Version(0, version.step + 1))


@settings(max_examples=40)
@given(
    script=st.lists(st.integers(0, 400), min_size=50, max_size=400),
    max_staleness=st.integers(0, 3),
    batch_groups=st.integers(1, 4),
)
def test_whatever_happens_prompts_end_once_and_the_ring_goes_on(
    script: list[int], max_staleness: int, batch_groups: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), max_staleness=max_staleness, batch_groups=batch_groups)
        for choice in script:
            world.step(choice)
        world.failures = False
        done = len(world.batches)
        _turn(world, 40 * batch_groups * (max_staleness + 2))  # engines at the learner's version again
        assert len(world.batches) > done, "the ring stands still"
        trained = [index for batch in world.batches for index in batch]
        assert len(trained) == len(set(trained))
        audit = world.ledger.audit(max_staleness)
        assert audit["violations"] == []
        assert audit["admitted"] == audit["outstanding"] + sum(audit["ended"].values())
        assert audit["ended"]["trained"] == len(trained)
        if max_staleness == 0:
            assert trained == sorted(trained)
            evicted = audit["ended"].get("evicted", 0)
            assert max(trained) < len(trained) + evicted  # nothing but declared refills in between
        world.ledger.close()


@given(st.integers(0, 4), st.integers(0, 50), st.integers(1, 64), st.integers(0, 300), st.integers(0, 300))
def test_capacity_is_what_can_be_trained_on_in_time(
    max_staleness: int, steps: int, size: int, taken: int, outstanding: int
) -> None:
    free = capacity(
        max_staleness=max_staleness, steps=steps, batch_groups=size, taken=taken, outstanding=outstanding
    )
    # With the prompts of this capacity admitted, the last of them is in batch steps + max_staleness.
    assert taken + outstanding + free == size * (steps + max_staleness + 1)


def test_versions_that_may_be_captioned_under() -> None:
    learner, bases = Version(1, 5), {1: 4}
    assert may_caption(Version(1, 4), learner, 2, bases)
    assert may_caption(Version(0, 4), learner, 2, bases)  # epoch 1 was made from these weights
    assert may_caption(Version(0, 3), learner, 2, bases)
    assert not may_caption(Version(0, 2), learner, 2, bases)
    assert not may_caption(Version(0, 5), learner, 2, bases)  # rolled back
    assert not may_caption(FOREIGN, learner, 2, bases)
    assert not may_caption(None, learner, 2, bases)
    assert not fresh(Version(1, 6), learner, 2, bases)  # of the future
    assert not fresh(Version(0, 4), Version(2, 5), 2, {1: 4, 2: 3})  # went back behind it twice


def test_an_engine_behind_the_learner_gets_no_prompt_that_would_be_trained_too_late(tmp_path: Path) -> None:
    world = World(tmp_path, max_staleness=1, batch_groups=2)
    world.failures = False
    for action in (0, 0, 1, 1, 2, 2, 3, 0, 0):  # one batch is trained on, two more groups are under way
        world.step(action)
    assert world.flow.version == Version(0, 1)
    assert len(world.generating) == 2
    # What version 0 captions is too old for the batch after the next, and the next has its groups.
    assert world.flow.next_generate("rollout-0", Version(0, 0), world.now) is None
    assert world.flow.next_generate("rollout-0", Version(0, 1), world.now) is not None


def test_a_stale_group_is_captioned_again_before_any_new_prompt(tmp_path: Path) -> None:
    world = World(tmp_path, max_staleness=1, batch_groups=1)
    world.failures = False
    world.step(0)
    work, engine = world.generating.pop()
    for _ in range(2):  # the learner goes two versions on with other prompts
        for action in (0, 1, 2, 3):
            world.step(action)
    assert world.flow.version.step == 2
    world.flow.generated(work, group(work.prompt, engine), world.now)
    again = world.flow.next_generate("rollout-0", world.flow.version, world.now)
    assert again is not None
    assert (again.prompt.key, again.prompt.attempt) == (work.prompt.key, 1)
    world.flow.generated(work, group(work.prompt, engine), world.now)  # the late twin counts for nothing
    assert world.flow.retried == {"stale": 1}


def test_the_same_questions_meet_every_attempt(tmp_path: Path) -> None:
    world = World(tmp_path, max_staleness=2, batch_groups=1)
    world.config.data.questions_per_image = 1
    world.failures = False
    asked = []
    for lost in (True, True, False):
        world.step(0)
        work, engine = world.generating.pop()
        world.flow.generated(work, group(work.prompt, engine), world.now)
        judge = world.flow.next_judge("judge-0", "judge", world.now)
        assert judge is not None
        asked.append(judge.questions)
        if lost:
            world.flow.failed(judge, "died", world.now, lost=True)
            again = world.flow.next_judge("judge-0", "judge", world.now)
            assert again is not None
            assert again.questions == judge.questions
            assert again.rotation == judge.rotation == work.prompt.index
    assert all(len(questions) == 1 for questions in asked)


def test_a_version_without_a_batch_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, max_staleness=1, batch_groups=1)
    with pytest.raises(LedgerError, match="learner reports"):
        world.flow.advance(Version(0, 1))
    with pytest.raises(LedgerError, match="no batch"):
        world.flow.measured(Version(0, 0))


def test_groups_without_any_spread_end_the_run_with_the_reason(tmp_path: Path) -> None:
    world = World(tmp_path, max_staleness=0, batch_groups=2)
    world.failures = False
    world.config.replay.max_evicted_batches = 3
    world.config.replay.min_reward_spread = 2.0  # no group has it
    with pytest.raises(NothingToTrain, match=r"7 filtered groups.*equal rewards.*max_evicted_batches=3"):
        _turn(world, 100)


def _turn(world: World, steps: int) -> None:
    for turn in range(steps):
        world.step(turn % 4)
