"""The real hub over real sockets, with peers that make captions and verdicts up."""

from __future__ import annotations

import asyncio
import json
import sqlite3
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
    running,
    shuffled,
)

from caprl_async.replay.evaluation import EvalError, EvalSpec
from caprl_async.replay.ledger import LedgerError
from caprl_async.replay.transport import encode
from caprl_async.types import Credit, Generated, GenerateLease, Hello, Judged, Outcome, Role, Version


def run(coroutine: Any, timeout: float = 40.0) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout))


async def turn(queue: Any, learner: StubLearner, rollout: StubRollout, step: int) -> Any:
    """One learner step: the batch, then the new version at hub and engine."""
    batch = await learner.batch(Version(0, step))
    await queue.trained(Version(0, step + 1), 10.0 + step, 11.0 + step)
    rollout.version = Version(0, step + 1)
    return batch


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
        config.replay.peer_timeout_s = 1.5
        hung, other, judge = StubRollout(), StubRollout("rollout-1"), StubJudge()
        async with running(config, tmp_path) as (queue, address), connected(address, judge):
            learner = StubLearner(address)
            async with bare_socket(address, "hung") as socket:
                await socket.send(encode(hung.hello))
                await socket.send(encode(Credit(free=2, version=Version(0, 0))))
                await queue.open_admission()
                await socket.recv()  # it has work and says no more
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
                await socket.send(encode(Credit(free=1, version=Version(0, 0))))
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
            await socket.send(encode(Credit(free=1)))  # without a Hello
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
                await asyncio.sleep(0.8)
            status = await queue.status()
            assert not stub.seen
            assert status["peers"] == {}
            assert status["messages"]["refused"] > 0
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


def test_a_row_whose_image_is_broken_is_evicted_and_the_rest_go_on(tmp_path: Path) -> None:
    async def whole() -> None:
        from replay_kit import png, write_data

        config = make_config(tmp_path)
        images = [{"bytes": png(i)[: 40 if i == 1 else None], "path": ""} for i in range(12)]
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
            assert (await queue.audit())["violations"] == []
            learner.close()

    run(whole())


def test_a_restart_from_a_cut_trains_every_prompt_once(tmp_path: Path) -> None:
    async def first_life(config: Any) -> Any:
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            state = msgspec.json.decode(msgspec.json.encode(await queue.state()))
            await turn(queue, learner, rollout, 1)  # after the cut: lost
            learner.close()
            return state

    async def second_life(config: Any, state: Any) -> None:
        rollout = StubRollout(incarnation="2")
        rollout.version = Version(1, 1)
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.restore(state, Version(1, 1))
            await queue.open_admission()
            trained: list[int] = []
            for step in (1, 2, 3):
                batch = await learner.batch(Version(1, step))
                trained += [scored.index for scored in batch.groups]
                await queue.trained(Version(1, step + 1), 0.0, 1.0)
                rollout.version = Version(1, step + 1)
            assert sorted(trained) == list(range(4, 16))
            audit = await queue.audit()
            assert audit["violations"] == []
            assert audit["ended"] == {"trained": 16}
            learner.close()

    config = make_config(tmp_path)
    state = run(first_life(config))
    with pytest.raises(LedgerError, match="resume=true"):
        run(first_life(config))
    config.resume = True
    run(second_life(config, state))


def test_a_checkpoint_goes_on_in_another_run_folder(tmp_path: Path) -> None:
    async def begin(config: Any) -> Any:
        rollout = StubRollout()
        async with (
            running(config, tmp_path / "a") as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            learner.close()
            return await queue.state()

    async def go_on(config: Any, state: Any) -> None:
        rollout = StubRollout()
        rollout.version = Version(1, 1)
        async with (
            running(config, tmp_path / "b") as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            learner = StubLearner(address)
            await queue.restore(state, Version(1, 1))
            await queue.open_admission()
            batch = await learner.batch(Version(1, 1))
            assert sorted(scored.index for scored in batch.groups) == [4, 5, 6, 7]
            assert (await queue.audit())["violations"] == []
            learner.close()

    config = make_config(tmp_path)
    run(go_on(config, run(begin(config))))


def test_evaluation_asks_every_judge_about_the_same_captions(tmp_path: Path) -> None:
    async def whole() -> None:
        from replay_kit import write_data

        config = make_config(tmp_path)
        config.evaluate.heldout_judge.model = "some/folder"
        alt = write_data(tmp_path / "alt.parquet", 5, stem="name its color")
        config.evaluate.heldout_judge.data = str(alt)
        rollout, judge = StubRollout(), StubJudge()
        rollout.delay = shuffled(3, 0.02)
        heldout = StubJudge("heldout-judge-0", "heldout")
        async with running(config, tmp_path) as (queue, address):
            async with connected(address, rollout, judge, heldout):
                await queue.open_admission()  # training and evaluation side by side
                spec = EvalSpec(name="start", images=4, judges=("judge", "heldout"))
                result = await queue.evaluate(spec)
                assert result["images"] == 4
                assert result["length"] == 2
                assert result["judges"]["heldout"]["n"] == 8
                assert result["judges"]["judge"]["accuracy"] == 1.0
                assert set(result["judges"]["judge"]["kinds"]) == {"fact", "absent"}
                json.dumps(result)
                asked = {lease.captions[0] for lease in heldout.seen}
                assert len(asked) == 4
                assert asked <= {text for lease in judge.seen for text in lease.captions}
                assert {lease.questions[0].stem for lease in heldout.seen} == {"name its color"}
                blind = await queue.evaluate(EvalSpec(name="blind", source="blind"))
                assert blind["length"] is None
                assert sum(lease.captions == ("",) for lease in judge.seen) == 5
                await queue.evaluate(EvalSpec(name="ceiling", source="reference", images=2))
                texts = {lease.captions[0] for lease in judge.seen}
                assert {"reference 0", "reference 1"} <= texts
                with pytest.raises(EvalError, match="plain file name"):
                    await queue.evaluate(EvalSpec(name="../up"))
            audit = await queue.audit()
            assert audit["admitted"] <= 12  # the capacity of training: no held-out image is among them
        lines = [json.loads(line) for line in (tmp_path / "evals" / "start.jsonl").read_text().splitlines()]
        assert len(lines) == 4
        assert lines[0]["questions"]["judge"][1]["answer"] == "unknown"
        assert lines[0]["finish"] == "stop"

    run(whole())


def test_an_evaluation_of_given_weights_waits_for_them(tmp_path: Path) -> None:
    async def whole() -> None:
        rollout = StubRollout()
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            asked = asyncio.create_task(
                queue.evaluate(EvalSpec(name="foreign", version=Version(-1, 0), images=2))
            )
            await asyncio.sleep(0.7)
            assert not asked.done()
            rollout.version = Version(-1, 0)
            assert (await asked)["images"] == 2

    run(whole())


def test_a_judge_of_another_name_gets_no_training_work(tmp_path: Path) -> None:
    async def whole() -> None:
        heldout = StubJudge("heldout-judge-0", "heldout")
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, StubRollout(), heldout),
        ):
            await queue.open_admission()
            await asyncio.sleep(1.0)
            assert heldout.seen == []
            status = await queue.status()
            assert status["capacity"] == 0  # no judge: admission has stopped at its bound
            assert status["states"] == {"judging": 12}

    run(whole())


def test_a_peer_learns_that_work_is_not_wanted(tmp_path: Path) -> None:
    async def whole() -> None:
        rollout = StubRollout()
        cancelled = []

        async def slow(lease: GenerateLease) -> Generated:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(lease.lease)
                raise
            raise AssertionError

        rollout.handle = slow  # type: ignore[method-assign]
        async with running(make_config(tmp_path), tmp_path) as (queue, address), connected(address, rollout):
            await queue.open_admission()
            await asyncio.sleep(0.7)
            await queue.finish()
            await asyncio.sleep(0.3)
            assert len(cancelled) == 4
            assert (await queue.status())["peers"]["rollout-0"]["held"] == 0

    run(whole())


def test_a_hello_of_another_role_is_kept_apart(tmp_path: Path) -> None:
    async def whole() -> None:
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            bare_socket(address, "l") as socket,
        ):
            await socket.send(encode(Hello(role=Role.LEARNER, name="learner-0", incarnation="1")))
            await socket.send(encode(Credit(free=5)))
            await queue.open_admission()
            await asyncio.sleep(0.3)
            assert await socket.poll(0) == 0

    run(whole())
