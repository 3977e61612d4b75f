"""Judges that are killed, hang, are slow, lie or are cut off: work is asked again, no reward is made up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from replay_kit import (
    StubJudge,
    StubLearner,
    StubRollout,
    bare_socket,
    connected,
    make_config,
    run,
    running,
    verdict,
    verdicts,
)

from caprl_async.config import Blind, Config
from caprl_async.replay.hub import HubFailed, ReplayQueue
from caprl_async.replay.transport import encode
from caprl_async.types import Credit, Judged, JudgeLease, Outcome, TrainBatch, Verdict, Version

HONEST = [0, 1 / 3, 2 / 3]  # what the stubs say of the three captions of each group


def _is_honest(batch: TrainBatch) -> bool:
    return all([parts.total for parts in scored.rewards] == pytest.approx(HONEST) for scored in batch.groups)


@asynccontextmanager
async def judged_by(
    judge: StubJudge, config: Config, tmp_path: Path
) -> AsyncIterator[tuple[ReplayQueue, StubLearner]]:
    """A queue at which captions flow and this judge alone answers, and a learner."""
    async with running(config, tmp_path) as (queue, address), connected(address, StubRollout(), judge):
        learner = StubLearner(address)
        await queue.open_admission()
        yield queue, learner


async def _until_asked(keys: set[str], judge: StubJudge) -> None:
    while not keys <= {lease.key for lease in judge.seen}:
        await asyncio.sleep(0.02)


async def _until_stopped(queue: ReplayQueue) -> None:
    while await queue.status():
        await asyncio.sleep(0.05)


def test_a_killed_judges_work_goes_to_its_successor(tmp_path: Path) -> None:
    async def whole() -> None:
        dying, successor = StubJudge(), StubJudge(incarnation="2")

        async def never(lease: JudgeLease) -> Judged:
            dying.seen.append(lease)
            await asyncio.sleep(60)
            raise AssertionError("not reached")

        dying.handle = never  # type: ignore[method-assign]
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, StubRollout()),
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            async with connected(address, dying):
                while len(dying.seen) < 2:
                    await asyncio.sleep(0.02)
            async with connected(address, successor):
                assert _is_honest(await learner.batch(Version(0, 0)))
                await _until_asked({lease.key for lease in dying.seen}, successor)
            assert (await queue.status())["evicted"] == {}

    run(whole())


def test_several_models_take_turns_and_each_group_is_asked_by_one(tmp_path: Path) -> None:
    async def story() -> None:
        config = make_config(tmp_path)
        config.judge.also, config.judge.num_actors = ["another"], 2
        judges = [StubJudge(), StubJudge("judge-1", serves="judge_1")]
        async with running(config, tmp_path) as (queue, address), connected(address, StubRollout(), *judges):
            learner = StubLearner(address)
            await queue.open_admission()
            measured: dict[str, float] = {}
            step = 0
            while (
                not {"accuracy_judge", "accuracy_judge_1"} <= measured.keys()
            ):  # a batch may hold one's alone
                assert await learner.batch(Version(0, step)) is not None
                if step:
                    measured |= await queue.step_metrics(Version(0, step))
                step += 1
        for parity, judge in enumerate(judges):
            assert judge.seen
            assert {int(lease.key.partition("/")[2]) % 2 for lease in judge.seen} == {parity}
            assert {lease.rotation % 2 for lease in judge.seen} == {0, 1}, "each meets every rotation"
        assert measured["accuracy_judge"] == measured["accuracy_judge_1"] == pytest.approx(1 / 3)

    run(story())


def test_with_a_hung_judge_nothing_more_is_captioned_until_one_answers(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.peer_timeout_s = 2.0
        config.replay.max_staleness = 50
        rollout, hung = StubRollout(), StubJudge()
        rollout.delay = lambda: 0.2
        async with running(config, tmp_path) as (queue, address), connected(address, rollout):
            learner = StubLearner(address)
            async with bare_socket(address, "hung") as socket:
                await socket.send(encode(hung.hello))
                await socket.send(encode(Credit(slots=1)))
                await queue.open_admission()
                while not (down := (await queue.status())["judges_down"]):
                    await asyncio.sleep(0.05)
                assert list(down) == ["judge"]
                assert (await queue.status())["capacity"] > 0
                captioned = len(rollout.seen)
                await asyncio.sleep(1.0)
                assert len(rollout.seen) == captioned
            async with connected(address, StubJudge("judge-1")):
                assert _is_honest(await learner.batch(Version(0, 0)))
                status = await queue.status()
            assert status["judges_down"] == {}
            assert status["metrics"]["judge_outages"] >= 1
            told = [error["error"] for error in status["errors"] if error["source"] == "judge"]
            assert any("judges do not answer" in text for text in told)
            assert any("judges answer again" in text for text in told)

    run(whole())


def test_an_answer_that_comes_too_late_counts_nothing(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.lease_timeout_s = 0.5
        slow = StubJudge()
        late = 3

        async def handle(lease: JudgeLease) -> Judged:
            nonlocal late
            answer = await StubJudge.handle(slow, lease)
            if late > 0:
                late -= 1
                wrong = [
                    [msgspec.structs.replace(v, score=1.0) for v in row] for row in answer.verdicts or ()
                ]
                with suppress(asyncio.CancelledError):  # told that it is too late, it answers all the same
                    await asyncio.sleep(1.5)
                return Judged(lease=lease.lease, verdicts=tuple(map(tuple, wrong)))
            return answer

        slow.handle = handle  # type: ignore[method-assign]
        async with judged_by(slow, config, tmp_path) as (queue, learner):
            assert _is_honest(await learner.batch(Version(0, 0)))
            assert late == 0
            assert (await queue.audit())["violations"] == []

    run(whole())


def _other_question(v: Verdict) -> Verdict:
    return msgspec.structs.replace(v, question_id="another")


LIES: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "a caption is missing": lambda rows: rows[:-1],
    "a question is missing": lambda rows: tuple(row[:-1] for row in rows),
    "other questions": lambda rows: tuple(tuple(map(_other_question, row)) for row in rows),
    "a score above 1": lambda rows: tuple(
        tuple(msgspec.structs.replace(v, score=7.0) for v in row) for row in rows
    ),
    "a score that is no number": lambda rows: tuple(
        tuple(msgspec.structs.replace(v, score=math.nan) for v in row) for row in rows
    ),
    "scored without a score": lambda rows: tuple(
        tuple(msgspec.structs.replace(v, score=None) for v in row) for row in rows
    ),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_wrong_answers_are_asked_again_and_believed_never(tmp_path: Path, lie: str) -> None:
    async def whole() -> None:
        judge, lied = StubJudge(), 0

        async def handle(lease: JudgeLease) -> Judged:
            nonlocal lied
            rows = verdicts(lease.questions, len(lease.captions))
            if lied < 2:
                lied += 1
                return Judged(lease=lease.lease, verdicts=LIES[lie](rows))
            return Judged(lease=lease.lease, verdicts=rows)

        judge.handle = handle  # type: ignore[method-assign]
        async with judged_by(judge, make_config(tmp_path), tmp_path) as (queue, learner):
            assert _is_honest(await learner.batch(Version(0, 0)))
            assert lied == 2
            assert (await queue.status())["evicted"] == {}

    run(whole())


def test_a_truncated_reply_is_dropped_and_its_work_leased_again(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.lease_timeout_s = 1.0
        stub = StubJudge()
        async with running(config, tmp_path) as (queue, address), connected(address, StubRollout()):
            learner = StubLearner(address)
            async with bare_socket(address, "cut off") as socket:
                await socket.send(encode(stub.hello))
                await socket.send(encode(Credit(slots=1)))
                await queue.open_admission()
                lease = msgspec.msgpack.decode(await socket.recv(), type=JudgeLease)
                await socket.send(encode(await stub.handle(lease))[:-20])
                while not (await queue.status())["messages"]["dropped"]:
                    await asyncio.sleep(0.02)
            other = StubJudge("judge-1")
            async with connected(address, other):
                assert _is_honest(await learner.batch(Version(0, 0)))
                await _until_asked({lease.key}, other)

    run(whole())


def test_what_cannot_be_scored_is_no_reward_and_no_failure_of_the_judge(tmp_path: Path) -> None:
    """One question is bad: the mean is over the other. Both are: the group is let go, with a reason."""

    async def whole() -> None:
        judge = StubJudge()

        async def handle(lease: JudgeLease) -> Judged:
            rows = verdicts(lease.questions, len(lease.captions))
            bad = 2 if lease.key in ("train/0", "train/1") else 1
            gone = [
                Verdict(question_id=q.question_id, outcome=Outcome.UNSCORABLE) for q in lease.questions[:bad]
            ]
            return Judged(lease=lease.lease, verdicts=tuple((*gone, *row[bad:]) for row in rows))

        judge.handle = handle  # type: ignore[method-assign]
        async with judged_by(judge, make_config(tmp_path), tmp_path) as (queue, learner):
            batch = await learner.batch(Version(0, 0))
            assert _is_honest(batch)
            assert {parts.scored for scored in batch.groups for parts in scored.rewards} == {1}
            assert {scored.group.key for scored in batch.groups}.isdisjoint({"train/0", "train/1"})
            status = await queue.status()
            assert status["evicted"] == {"unscorable": 2}
            assert status["judges_down"] == {}

    run(whole())


def test_a_question_that_is_answered_without_a_caption_leaves_the_reward(tmp_path: Path) -> None:
    """An empty caption is judged beside each group's; the reward is then of the other question alone."""

    async def whole() -> None:
        config = make_config(tmp_path)
        config.reward.blind = Blind.drop
        judge = StubJudge()

        async def handle(lease: JudgeLease) -> Judged:
            assert lease.captions[0] == ""
            fact, absent = lease.questions
            rows = [
                (verdict(fact, 0.9), verdict(absent, 1.0)),
                *((verdict(fact, 1.0), verdict(absent, i / 3)) for i in range(3)),
            ]
            return Judged(lease=lease.lease, verdicts=tuple(rows))

        judge.handle = handle  # type: ignore[method-assign]
        async with judged_by(judge, config, tmp_path) as (queue, learner):
            batch = await learner.batch(Version(0, 0))
            assert _is_honest(batch)
            assert {scored.weights for scored in batch.groups} == {(0.0, 1.0)}
            assert {parts.asked for scored in batch.groups for parts in scored.rewards} == {1}
            assert {len(scored.group.captions) for scored in batch.groups} == {3}
            metrics = await queue.step_metrics(Version(0, 0))
            assert metrics["blind_score_mean"] == pytest.approx(0.95)
            assert metrics["blind_dropped_share"] == 0.5

    run(whole())


def _down(row: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
    return tuple(msgspec.structs.replace(v, outcome=Outcome.JUDGE_DOWN, score=None) for v in row)


def test_what_is_down_for_one_group_alone_costs_that_group_alone(tmp_path: Path) -> None:
    """The API refuses all captions of one image, and one question of another, time and again."""

    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.max_attempts = 2
        judge = StubJudge()

        async def handle(lease: JudgeLease) -> Judged:
            rows = verdicts(lease.questions, len(lease.captions))
            if lease.key == "train/0":
                return Judged(lease=lease.lease, verdicts=tuple(map(_down, rows)))
            if lease.key == "train/1":
                return Judged(lease=lease.lease, verdicts=tuple((*_down(row[:1]), *row[1:]) for row in rows))
            return Judged(lease=lease.lease, verdicts=rows)

        judge.handle = handle  # type: ignore[method-assign]
        async with judged_by(judge, config, tmp_path) as (queue, learner):
            while (await queue.status())["evicted"] != {"unscorable": 1}:
                await asyncio.sleep(0.05)
            batch = await learner.batch(Version(0, 0))
            assert _is_honest(batch)
            assert batch.groups[0].group.key == "train/1"
            assert {parts.scored for parts in batch.groups[0].rewards} == {1}
            assert (await queue.status())["metrics"]["judge_outages"] == 0

    run(whole())


def test_judges_that_stay_away_end_the_run_with_what_to_do(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.judge_failures = 2
        config.replay.judge_outage_s = 1.0
        config.replay.max_attempts = 100
        judge = StubJudge()

        async def handle(lease: JudgeLease) -> Judged:
            rows = verdicts(lease.questions, len(lease.captions))
            refused = [
                tuple(msgspec.structs.replace(v, reason="connection refused") for v in _down(row))
                for row in rows
            ]
            return Judged(lease=lease.lease, verdicts=tuple(refused))

        judge.handle = handle  # type: ignore[method-assign]
        async with running(config, tmp_path) as (queue, address), connected(address, StubRollout(), judge):
            await queue.open_admission()
            with pytest.raises(HubFailed, match=r"connection refused.*resume=true.*judge_outage_s"):
                await _until_stopped(queue)

    run(whole())
