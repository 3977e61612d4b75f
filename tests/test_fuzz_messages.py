"""Thousands of broken, replayed and lying messages at the hub and at its peers, beside honest ones."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
from bad_messages_kit import (
    NUMBERS,
    PROMPT,
    QUESTIONS,
    WHOLE,
    contents,
    garbage,
    lying_groups,
    lying_verdicts,
    one,
    train,
    with_last,
)
from msgspec.structs import replace
from replay_kit import (
    StubJudge,
    StubLearner,
    StubRollout,
    bare_socket,
    connected,
    group,
    make_config,
    run,
    running,
    verdicts,
)

from caprl_async.replay.transport import HubAddress, decode_hub, decode_peer, encode
from caprl_async.replay.work import JudgeWork, wrong_group, wrong_verdicts
from caprl_async.types import (
    Credit,
    Generated,
    GenerateLease,
    Hello,
    Judged,
    JudgeLease,
    Role,
    Version,
)

FLOOD = 3000
# ---------------------------------------------------------------- numbers in well-formed answers


def test_numbers_that_are_none_are_refused_as_failures() -> None:
    honest = group(PROMPT, Version(0, 0))
    assert wrong_group(PROMPT, honest) is None
    liars = list(lying_groups(honest, PROMPT.sampling.max_tokens))
    assert len(liars) > 35
    for liar in liars:
        assert wrong_group(PROMPT, liar), liar
    work = JudgeWork(cast(Any, None), "train/0", 0, ("a", "b", "c"), QUESTIONS, 0, "judge")
    assert wrong_verdicts(work, verdicts(QUESTIONS, 3)) is None
    told = list(lying_verdicts(verdicts(QUESTIONS, 3)))
    assert len(told) > 25
    for liar in told:
        assert wrong_verdicts(work, liar), liar


def test_whatever_passes_can_be_trained_on() -> None:
    passed = 0
    for seed in range(3000):
        chance = random.Random(seed)
        honest = group(PROMPT, Version(0, 0))
        last = honest.captions[-1]
        odd = with_last(
            honest,
            logprobs=one(last.logprobs, chance.choice(NUMBERS)),
            token_ids=one(last.token_ids, chance.choice(WHOLE)),
        )
        odd = replace(odd, image_grid=((chance.choice(WHOLE), 2, 2),), finished=chance.choice(NUMBERS))
        if wrong_group(PROMPT, odd) is not None:
            continue
        passed += 1
        assert math.isfinite(odd.finished), seed
        for caption in odd.captions:
            assert all(-math.inf < value <= 0 for value in caption.logprobs), seed
            assert all(0 <= token < 2**31 for token in caption.token_ids), seed
        assert all(0 < side < 2**31 for side in odd.image_grid[0]), seed
    assert passed > 10


# ---------------------------------------------------------------- at the hub


def test_a_flood_of_nonsense_costs_the_others_nothing(tmp_path: Path) -> None:
    async def whole() -> None:
        sent: list[list[bytes]] = []

        async def vandalise(address: HubAddress, name: str, messages: int) -> None:
            chance = random.Random(name)
            kept: list[list[bytes]] = []  # to be replayed
            async with bare_socket(address, name) as end:
                for i in range(messages):
                    if i % 500 == 0:
                        frames = [encode(Hello(role=Role.ROLLOUT, name=name, incarnation=str(i)))]
                    elif kept and chance.random() < 0.2:
                        frames = chance.choice(kept)
                    else:
                        frames = [encode(contents(chance))] if chance.random() < 0.4 else garbage(chance)
                    kept.append(frames)
                    sent.append(frames)
                    await end.send_multipart(frames)
                    if i % 50 == 0:
                        await asyncio.sleep(0)
                while (await queue.status())["messages"]["dropped"] < dropped():
                    await asyncio.sleep(0.02)

        def dropped() -> int:
            return sum(len(frames) != 1 or decode_peer(frames[0]) is None for frames in sent)

        config = make_config(tmp_path)
        config.replay.max_staleness = 0  # batches are the next prompts, none left out
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            vandals = [asyncio.create_task(vandalise(address, f"vandal-{i}", FLOOD // 3)) for i in range(3)]
            trained = await train(queue, learner, rollout, steps=6)
            await asyncio.gather(*vandals)
            trained += await train(queue, learner, rollout, steps=2, first=6)
            status, audit = await queue.status(), await queue.audit()
        assert trained == list(range(8 * 4))
        assert audit["violations"] == []
        assert audit["evicted"] == {}
        assert audit["retried"] == {}
        assert status["messages"]["dropped"] == dropped() > FLOOD / 4
        assert status["messages"]["refused"] == 0
        assert status["unexpected"] > 0
        assert status["metrics"]["messages_dropped"] == dropped()
        assert msgspec.json.encode(status["metrics"])

    run(whole())


async def _lie(
    address: HubAddress, hello: Hello, lies: Callable[[Any], Iterator[Any]], done: asyncio.Event
) -> None:
    """Takes one lease after another and answers each with the next lie."""
    told = 0
    async with bare_socket(address, f"{hello.name}/1") as end:
        while True:
            await end.send(encode(hello))
            await end.send(encode(Credit(slots=1, version=Version(0, 0))))
            lease = decode_hub(await end.recv())
            if not isinstance(lease, GenerateLease | JudgeLease):
                continue
            every = list(lies(lease))
            answer = encode(every[told % len(every)])
            for _ in range(2):  # and replayed
                await end.send(answer)
            told += 1
            if told >= len(every):
                done.set()
                return


class SlowJudge(StubJudge):
    """So slow that another judge gets work too."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = 1

    async def handle(self, lease: JudgeLease) -> Judged:
        await asyncio.sleep(0.05)
        return await super().handle(lease)


def test_peers_that_lie_about_numbers_never_reach_the_learner(tmp_path: Path) -> None:
    def groups(lease: GenerateLease) -> Iterator[Generated | Judged]:
        for liar in lying_groups(group(lease.prompt, Version(0, 0)), lease.prompt.sampling.max_tokens):
            yield Generated(lease=lease.lease, group=liar)
        yield Generated(lease=lease.lease)
        yield Generated(lease=lease.lease, failure="x" * 100_000)
        yield Judged(lease=lease.lease, verdicts=())

    def judged(lease: JudgeLease) -> Iterator[Judged]:
        for liar in lying_verdicts(verdicts(lease.questions, len(lease.captions))):
            yield Judged(lease=lease.lease, verdicts=liar)
        yield Judged(lease=lease.lease)

    async def whole() -> None:
        config = make_config(tmp_path, rows=100)
        config.replay.max_staleness = 40
        config.replay.max_attempts = 1000
        config.replay.judge_failures = 1000
        config.replay.peer_timeout_s = 2.0
        rollout, judge = StubRollout(slots=2), SlowJudge()
        rollout.delay = lambda: 0.02
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            ends = [asyncio.Event(), asyncio.Event()]
            hellos = [
                Hello(role=Role.ROLLOUT, name="liar-0", incarnation="1"),
                Hello(role=Role.JUDGE, name="liar-1", incarnation="1", serves="judge"),
            ]
            told = zip(hellos, (groups, judged), ends, strict=True)
            liars = [asyncio.create_task(_lie(address, *lie)) for lie in told]
            trained: list[int] = []
            step = 0
            while not all(end.is_set() for end in ends) or step < 5:
                trained += await train(queue, learner, rollout, steps=1, first=step)
                step += 1
            await asyncio.gather(*liars)
            status, audit = await queue.status(), await queue.audit()
        assert len(trained) == len(set(trained)) == 4 * step
        assert audit["violations"] == []
        assert audit["evicted"] == {}
        assert audit["retried"]["failed"] > 35
        assert status["error_counts"]["train"] > 60
        assert all(len(error["error"]) <= 1000 for error in status["errors"])

    run(whole(), timeout=90.0)


def test_another_who_takes_a_name_costs_work_and_no_more(tmp_path: Path) -> None:
    """Hellos and answers of honest peers, replayed over a connection of someone else."""

    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.max_staleness = 0
        config.replay.max_attempts = 1000
        rollout, judge = StubRollout(), StubJudge()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            trained: list[int] = []
            async with bare_socket(address, "impostor") as end:
                for step in range(4):
                    for hello in (rollout.hello, judge.hello):
                        for incarnation in (hello.incarnation, "0"):
                            await end.send(encode(replace(hello, incarnation=incarnation)))
                    for prompt in rollout.seen:
                        for lease in range(1, 80):
                            await end.send(encode(Generated(lease=lease, group=group(prompt, Version(0, 0)))))
                    trained += await train(queue, learner, rollout, steps=1, first=step)
            audit = await queue.audit()
        assert trained == list(range(4 * 4))
        assert audit["violations"] == []
        assert audit["evicted"] == {}

    run(whole())
