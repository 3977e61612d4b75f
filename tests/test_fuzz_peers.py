"""Strangers at the hub, and what a rollout, a judge or a learner makes of a hub that says nonsense."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from bad_messages_kit import PROMPT, QUESTIONS, WHOLE, broken, train
from msgspec.structs import replace
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

from caprl_async.replay import transport
from caprl_async.replay.peer import LearnerPeer
from caprl_async.replay.transport import HubAddress, HubKeys, HubSocket, connect, decode_hub, encode
from caprl_async.types import (
    Ack,
    BatchReply,
    BatchRequest,
    Generated,
    GenerateLease,
    Hello,
    JudgeLease,
    Revoke,
    Role,
    TrainBatch,
    Version,
)

FLOOD = 2000
WITHOUT_KEYS = b"\xff" + bytes(8) + b"\x7f\x03\0NULL" + bytes(60)
"""A greeting of our protocol that asks for no security."""


@asynccontextmanager
async def strangers(address: HubAddress) -> AsyncIterator[None]:
    """Without the keys: nothing, other keys, a password, another program's greeting."""
    port = int(address.endpoint.rpartition(":")[2])
    context, chance = zmq.asyncio.Context(), random.Random(0)
    public, secret = zmq.curve_keypair()
    hello = encode(Hello(role=Role.LEARNER, name="stranger", incarnation="1"))
    greetings = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02", WITHOUT_KEYS]
    try:
        for changes in ({"client_key": public, "client_secret": secret}, {"server_key": public}):
            await connect(context, replace(address, **changes), "stranger").send(hello)
        for options in ({}, {"plain_username": b"a", "plain_password": b"b"}):
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            for name, value in options.items():
                setattr(dealer, name, value)
            dealer.connect(address.endpoint)
            await dealer.send(hello)
        with ExitStack() as connections:
            for i in range(100):
                raw = connections.enter_context(socket.create_connection(("127.0.0.1", port)))
                raw.sendall([*greetings, b"", chance.randbytes(chance.randrange(1, 5000))][i % 5])
            yield
    finally:
        context.destroy(linger=0)


def test_strangers_are_counted_and_not_heard(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            async with strangers(address):
                await train(queue, learner, rollout, steps=3)
                while (await queue.status())["messages"]["refused"] < 20:  # our protocol, without our keys
                    await asyncio.sleep(0.02)
            status = await queue.status()
        assert set(status["peers"]) == {"rollout-0", "judge-0", "learner-0"}
        assert status["metrics"]["messages_refused"] >= 20
        assert (status["messages"]["dropped"], status["unexpected"]) == (0, 0)

    run(whole())


def test_strangers_do_not_hold_up_the_hub_while_its_loop_is_busy() -> None:
    async def whole() -> None:
        hub = HubSocket()
        address = hub.start("127.0.0.1", HubKeys.make())
        port = int(address.endpoint.rpartition(":")[2])
        try:
            for _ in range(FLOOD + 200):  # more than a socket queues unless it is told to
                with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                    raw.sendall(WITHOUT_KEYS)
                    with suppress(ConnectionResetError):
                        while raw.recv(1024):  # until the hub has refused it
                            pass
            while hub.refused < FLOOD + 200:
                await asyncio.sleep(0.01)
        finally:
            hub.close()

    run(whole())


def test_only_a_learner_can_say_that_a_batch_is_trained(tmp_path: Path) -> None:
    async def whole() -> None:
        rollout, vandal = StubRollout(), StubRollout("vandal")
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, rollout, StubJudge()),
            bare_socket(address, "vandal") as end,
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            await learner.batch(Version(0, 0))
            for message in (BatchRequest(version=Version(0, 1)), vandal.hello) * 2:
                await end.send(encode(message))
            while (await queue.status())["unexpected"] < 2:
                await asyncio.sleep(0.02)
            assert (await queue.status())["version"] == "0.0"
            assert "trained" not in (await queue.status())["states"]

    run(whole())


def test_a_message_too_long_ends_its_connection_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_MAX_MESSAGE", 1 << 20)

    async def whole() -> None:
        rollout = StubRollout()
        async with running(make_config(tmp_path), tmp_path) as (queue, address):
            async with connected(address, rollout, StubJudge()), bare_socket(address, "x") as end:
                learner = StubLearner(address)
                await queue.open_admission()
                await end.send(encode(Generated(lease=1, failure="x" * (1 << 21))))
                await train(queue, learner, rollout, steps=3)
                await end.send(b"garbage")  # over a new connection
                while not (await queue.status())["messages"]["dropped"]:
                    await asyncio.sleep(0.02)
            assert (await queue.status())["messages"]["dropped"] == 1

    run(whole())


# ---------------------------------------------------------------- a hub that says nonsense


def hub_message(chance: random.Random) -> Any:
    """A message that decodes; leases have numbers that no honest hub grants."""
    number = chance.choice([w for w in WHOLE if w < 1])
    match chance.randrange(6):
        case 0:
            return GenerateLease(
                lease=number, prompt=replace(PROMPT, index=number, text="x" * chance.randrange(99))
            )
        case 1:
            return JudgeLease(
                lease=number, key="", attempt=number, captions=(), questions=QUESTIONS, rotation=number
            )
        case 2:
            return Ack(lease=chance.choice(WHOLE))
        case 3:
            return Revoke(lease=number)
        case 4:
            return BatchReply(
                batch=TrainBatch(version=Version(chance.choice(WHOLE), 10**6), groups=(), cut=0.0)
            )
        case _:
            return Revoke(lease=chance.randrange(10**6, 10**6 + 99))


def flood(seed: int) -> list[bytes]:
    """All but what ends the work of an honest peer: no batch is said to be the last."""
    chance = random.Random(seed)
    every = [encode(hub_message(chance)) for _ in range(FLOOD)]
    mixed = [data if chance.random() < 0.4 else broken(data, chance) for data in every]
    return [data for data in mixed if decode_hub(data) != BatchReply(batch=None)]


@pytest.mark.parametrize("kind", [StubRollout, StubJudge])
def test_an_engine_goes_on_through_a_flood(kind: type[StubRollout] | type[StubJudge]) -> None:
    lease = JudgeLease(lease=7, key="k", attempt=0, captions=("a",), questions=QUESTIONS, rotation=0)
    good = GenerateLease(lease=7, prompt=PROMPT) if kind is StubRollout else lease
    known = GenerateLease | JudgeLease | Ack | Revoke

    async def whole() -> None:
        hub, stub = HubSocket(), kind()
        address = hub.start("127.0.0.1", HubKeys.make())
        try:
            async with connected(address, stub) as (peer,):
                identity, _ = await hub.receive()
                sent = flood(1)
                for data in [*sent, *[encode(good)] * 5]:  # the good one is replayed
                    await hub.send(identity, data)
                answer: Any = None
                while getattr(answer, "lease", None) != 7:
                    _, answer = await hub.receive()
                assert answer.failure is None
                expected = PROMPT if kind is StubRollout else good
                assert [seen for seen in stub.seen if seen == expected] == [expected]
                assert (
                    peer.dropped == sum(not isinstance(decode_hub(data), known) for data in sent) > FLOOD / 4
                )
        finally:
            hub.close()

    run(whole())


def test_a_learner_waits_through_a_flood_for_its_batch() -> None:
    async def whole() -> None:
        hub = HubSocket()
        address = hub.start("127.0.0.1", HubKeys.make())
        peer = LearnerPeer(address, Hello(role=Role.LEARNER, name="learner-0", incarnation="1"))
        try:
            waiting = asyncio.create_task(asyncio.to_thread(peer.request_batch, Version(0, 3), 20.0))
            identity, message = await hub.receive()
            while not isinstance(message, BatchRequest):
                identity, message = await hub.receive()
            sent = flood(2)
            for data in sent:
                await hub.send(identity, data)
            good = TrainBatch(version=Version(0, 3), groups=(), cut=1.0)
            await hub.send(identity, encode(BatchReply(batch=good)))
            assert await waiting == good
            assert peer.dropped == sum(not isinstance(decode_hub(data), BatchReply) for data in sent)
        finally:
            peer.close()
            hub.close()

    run(whole())
