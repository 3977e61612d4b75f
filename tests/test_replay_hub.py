"""The real hub over real sockets, with peers that make captions and verdicts up."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from replay_kit import (
    StubJudge,
    StubLearner,
    StubRollout,
    bare_socket,
    connected,
    make_config,
    png,
    run,
    running,
    shuffled,
    turn,
    write_data,
)

from caprl_async.replay.tally import Measured
from caprl_async.replay.transport import encode
from caprl_async.types import Credit, Generated, GenerateLease, Hello, Role, Version


def test_the_ring_turns_and_the_ledger_adds_up(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout, judge = StubRollout(), StubJudge()
        rollout.delay = shuffled(1, 0.05)
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            for step in range(5):
                batch = await turn(queue, learner, rollout, step)
                assert batch.version == Version(0, step)
                assert len(batch.groups) == 4
                for scored in batch.groups:
                    assert scored.group.oldest.step >= step - 2
                    assert [parts.total for parts in scored.rewards] == pytest.approx([0, 1 / 3, 2 / 3])
                    assert all(scored.group.key in c.text for c in scored.group.captions)
                metrics = await queue.step_metrics(Version(0, step))
                assert metrics["reward_mean"] == pytest.approx(1 / 3)
                assert metrics["staleness_max"] <= 2
            status = await queue.status()
            assert status["states"]["trained"] == 20
            assert status["captions_per_s"] > 0
            while "judge" not in status["busy"]:  # known after two heartbeats
                await asyncio.sleep(0.1)
                status = await queue.status()
            assert status["metrics"]["idle_judge"] == pytest.approx(0.75)
            await queue.finish()
            assert await learner.batch(Version(0, 5)) is None
            audit = await queue.audit()
            assert audit["violations"] == []
            assert audit["ended"] == {"trained": 20}
            learner.close()
        assert not any(hasattr(prompt, "questions") for prompt in rollout.seen)
        with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
            assert ledger.execute("select count(*) from events where event = 'step'").fetchone() == (5,)
        samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 10
        assert samples[0]["questions"][0]["scores"] == pytest.approx([0, 1 / 3, 2 / 3])
        assert samples[0]["questions"][1]["answer"] is None

    run(whole())


def test_an_engine_that_announces_its_new_weights_need_not_wait_for_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caprl_async.replay.peer._BEAT_S", 60.0)

    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.max_staleness = 0
        rollout, judge = StubRollout(), StubJudge()
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, rollout, judge) as (peer, _),
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            for step in range(3):
                await turn(queue, learner, rollout, step)
                peer.announce()

    run(whole(), timeout=20.0)


def test_a_batch_is_read_while_the_learner_trains_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Version] = []
    monkeypatch.setattr(Measured, "metrics", lambda self: read.append(self.batch.version) or self.numbers)

    async def whole() -> None:
        config = make_config(tmp_path)
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, StubRollout(), StubJudge()),
        ):
            await queue.open_admission()
            await StubLearner(address).batch(Version(0, 0))
            while not read:
                await asyncio.sleep(0.01)
            await queue.trained(Version(0, 1), 1.0, 2.0)
            assert (await queue.step_metrics(Version(0, 0)))["staleness_max"] == 0
            assert read == [Version(0, 0)]

    run(whole(), timeout=20.0)


def test_without_staleness_batches_are_the_samplers_order(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.max_staleness = 0
        rollout, judge = StubRollout(), StubJudge()
        rollout.delay = shuffled(2, 0.05)
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            for step in range(4):
                batch = await turn(queue, learner, rollout, step)
                assert [scored.index for scored in batch.groups] == list(range(4 * step, 4 * step + 4))
                versions = {s.version for g in batch.groups for c in g.group.captions for s in c.spans}
                assert versions == {Version(0, step)}
            learner.close()

    run(whole())


def test_asking_again_gives_the_same_batch_to_every_rank(tmp_path: Path) -> None:
    async def whole() -> None:
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, StubRollout(), StubJudge()),
        ):
            first, second = StubLearner(address), StubLearner(address, "learner-1")
            await queue.open_admission()
            batches = [await rank.batch(Version(0, 0)) for rank in (first, second, first)]
            assert encode(batches[0]) == encode(batches[1]) == encode(batches[2])
            await first.batch(Version(0, 1))  # without `trained`: the request itself says so
            assert (await queue.audit())["ended"] == {"trained": 4}
            first.close()
            second.close()

    run(whole())


def test_a_row_whose_image_is_broken_is_evicted_and_the_rest_go_on(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        images = [{"bytes": b"garbage" if i == 1 else png(i), "path": ""} for i in range(12)]
        write_data(tmp_path / "train.parquet", 12, image=images)
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, StubRollout(), StubJudge()),
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            batch = await learner.batch(Version(0, 0))
            assert 1 not in {scored.index for scored in batch.groups}
            assert (await queue.status())["evicted"] == {"bad_row": 1}
            (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
            assert (reject["row_id"], reject["reason"]) == ("row-1", "bad_image")
            assert (await queue.audit())["violations"] == []
            learner.close()

    run(whole())


def test_a_judge_of_another_name_gets_no_training_work(tmp_path: Path) -> None:
    async def whole() -> None:
        heldout = StubJudge("heldout-judge-0", "heldout")
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, StubRollout(), heldout),
        ):
            await queue.open_admission()
            while "judge" not in (await queue.status())["judges_down"]:
                await asyncio.sleep(0.02)
            paused = (await queue.status())["states"]
            await asyncio.sleep(0.3)
            assert heldout.seen == []
            status = await queue.status()
            assert status["judges_down"] == {"judge": "no judge is alive"}
            assert sum(status["states"].values()) == sum(paused.values())  # nothing more is admitted

    run(whole())


def test_a_peer_learns_that_work_is_not_wanted(tmp_path: Path) -> None:
    async def whole() -> None:
        rollout = StubRollout()
        begun, cancelled = [], []

        async def slow(lease: GenerateLease) -> Generated:
            begun.append(lease.lease)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(lease.lease)
                raise
            raise AssertionError

        rollout.handle = slow  # type: ignore[method-assign]
        async with running(make_config(tmp_path), tmp_path) as (queue, address), connected(address, rollout):
            await queue.open_admission()
            while len(begun) < 4:
                await asyncio.sleep(0.02)
            await queue.finish()
            while len(cancelled) < 4 or (await queue.status())["peers"]["rollout-0"]["held"]:
                await asyncio.sleep(0.02)
            assert sorted(cancelled) == sorted(begun)

    run(whole())


def test_a_hello_of_another_role_is_kept_apart(tmp_path: Path) -> None:
    async def whole() -> None:
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            bare_socket(address, "l") as socket,
        ):
            await socket.send(encode(Hello(role=Role.LEARNER, name="learner-0", incarnation="1")))
            await socket.send(encode(Credit(slots=5)))
            await queue.open_admission()
            await asyncio.sleep(0.3)
            assert await socket.poll(0) == 0

    run(whole())
