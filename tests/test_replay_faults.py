"""The hub when peers die, hang, lie, send rubbish or are strangers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from replay_kit import (
    StubJudge,
    StubLearner,
    StubRollout,
    bare_socket,
    connected,
    make_config,
    run,
    running,
)

from caprl_async.replay.transport import encode
from caprl_async.types import Credit, Generated, GenerateLease, Judged, Outcome, Version


def test_a_dead_rollouts_prompts_are_captioned_by_its_successor(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        first, second, judge = StubRollout(), StubRollout(incarnation="2"), StubJudge()
        first.delay = lambda: 60.0
        async with running(config, tmp_path) as (queue, address), connected(address, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            async with connected(address, first):
                while len(first.seen) < 4:
                    await asyncio.sleep(0.02)
            async with connected(address, second):
                batch = await learner.batch(Version(0, 0))
            assert {scored.group.attempt for scored in batch.groups} == {1}
            assert {prompt.key for prompt in first.seen} <= {prompt.key for prompt in second.seen}
            audit = await queue.audit()
            assert audit["violations"] == []
            assert audit["retried"] == {"failed": 4}
            learner.close()

    run(whole())


def test_a_silent_peer_loses_its_leases_to_another(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.peer_timeout_s = 4.0
        hung, other, judge = StubRollout(), StubRollout("rollout-1"), StubJudge()
        async with running(config, tmp_path) as (queue, address), connected(address, judge):
            learner = StubLearner(address)
            async with bare_socket(address, "hung") as socket:
                await socket.send(encode(hung.hello))
                await socket.send(encode(Credit(slots=2, version=Version(0, 0))))
                await queue.open_admission()
                for _ in range(2):
                    await socket.recv()
                # It has work and says no more.
                async with connected(address, other):
                    assert await learner.batch(Version(0, 0))
                    while (await queue.status())["peers"]["rollout-0"]["alive"]:
                        await asyncio.sleep(0.1)
                    assert (await queue.audit())["retried"] == {"failed": 2}
                assert (await queue.audit())["violations"] == []
                learner.close()

    run(whole())


def test_answers_are_acknowledged_once_taken_and_resending_counts_nothing_twice(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        async with running(config, tmp_path) as (queue, address):
            stub = StubRollout()
            async with bare_socket(address, "x") as socket:
                await socket.send(encode(stub.hello))
                await socket.send(encode(Credit(slots=1, version=Version(0, 0))))
                await queue.open_admission()
                lease = msgspec.msgpack.decode(await socket.recv(), type=GenerateLease)
                answer = encode(await stub.handle(lease))
                for _ in range(3):
                    await socket.send(answer)
                kinds = [msgspec.msgpack.decode(await socket.recv())["type"] for _ in range(4)]
                assert sorted(kinds) == ["ack", "ack", "ack", "generate"]
                assert (await queue.status())["states"] == {"judging": 1, "generating": 1}

    run(whole())


def test_garbage_is_dropped_and_counted(tmp_path: Path) -> None:
    async def whole() -> None:
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            bare_socket(address, "x") as socket,
        ):
            wrong_type = msgspec.msgpack.encode({"type": "hello", "role": "king", "name": 3})
            for data in (b"", b"\xff\x00garbage", b"\x93" * 100, wrong_type, b"\x81" * 50_000):
                await socket.send(data)
            await socket.send_multipart([b"two", b"frames"])
            await socket.send(encode(Credit(slots=1)))  # without a Hello
            async with connected(address, StubRollout(), StubJudge()):
                learner = StubLearner(address)
                await queue.open_admission()
                assert await learner.batch(Version(0, 0))
                learner.close()
            status = await queue.status()
            assert status["messages"]["dropped"] == 6
            assert status["unexpected"] == 1

    run(whole())


def test_a_wrong_key_is_refused(tmp_path: Path) -> None:
    async def whole() -> None:
        async with running(make_config(tmp_path), tmp_path) as (queue, address):
            public, secret = zmq.curve_keypair()
            stranger = msgspec.structs.replace(address, client_key=public, client_secret=secret)
            stub = StubRollout()
            async with connected(stranger, stub):
                await queue.open_admission()
                while not (await queue.status())["messages"]["refused"]:
                    await asyncio.sleep(0.02)
            status = await queue.status()
            assert not stub.seen
            assert status["peers"] == {}
            assert "secret" not in repr(address)
            assert address.client_secret.decode() not in repr(address)

    run(whole())


def test_no_judge_failure_becomes_a_reward(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        judge = StubJudge()
        answer = judge.handle
        calls = 0

        async def unsteady(lease: Any) -> Judged:
            nonlocal calls
            calls += 1
            if calls % 3 == 1:
                raise RuntimeError("out of memory")
            good = await answer(lease)
            if calls % 3 == 2:
                assert good.verdicts is not None
                down = msgspec.structs.replace(good.verdicts[0][0], outcome=Outcome.JUDGE_DOWN, score=None)
                rows = ((down, *good.verdicts[0][1:]), *good.verdicts[1:])
                return Judged(lease=lease.lease, verdicts=rows)
            return good

        judge.handle = unsteady  # type: ignore[method-assign]
        async with running(config, tmp_path) as (queue, address), connected(address, StubRollout(), judge):
            learner = StubLearner(address)
            await queue.open_admission()
            batch = await learner.batch(Version(0, 0))
            for scored in batch.groups:
                assert [parts.total for parts in scored.rewards] == pytest.approx([0, 1 / 3, 2 / 3])
            status = await queue.status()
            assert status["evicted"] == {}
            assert any("out of memory" in error["error"] for error in status["errors"])
            learner.close()

    run(whole())


def test_an_answer_for_another_image_is_not_believed(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout = StubRollout()
        answer = rollout.handle
        lied: list[str] = []

        async def lying(lease: Any) -> Generated:
            good = await answer(lease)
            if not lied and good.group is not None:
                lied.append(lease.prompt.key)
                return Generated(
                    lease=lease.lease, group=msgspec.structs.replace(good.group, image_sha256="0" * 64)
                )
            return good

        rollout.handle = lying  # type: ignore[method-assign]
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await learner.batch(Version(0, 0))
            assert (await queue.audit())["retried"] == {"failed": 1}
            learner.close()

    run(whole())
