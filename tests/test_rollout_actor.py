"""A rollout actor with a real engine at a real socket of the hub; only Ray is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_kit import MAX_PIXELS, MIN_PIXELS, PROMPT, noise_image, tiny_engine, tiny_model

from caprl_async.config import Config, PolicyConfig, RolloutConfig, WeightBackend, WeightsConfig
from caprl_async.replay.transport import HubKeys, HubSocket, encode
from caprl_async.rollout import actor as rollout
from caprl_async.rollout.actor import NotStarted, RolloutActor
from caprl_async.types import (
    Ack,
    Credit,
    Finish,
    Generated,
    GenerateLease,
    Hello,
    ImageRef,
    Prompt,
    Revoke,
    Role,
    Sampling,
    Version,
)


def prompt(image: ImageRef, index: int = 0, max_tokens: int = 12, min_tokens: int = 0) -> Prompt:
    return Prompt(
        key=f"train/{index}",
        index=index,
        attempt=0,
        row_id=f"row{index}",
        image=image,
        text=PROMPT,
        sampling=Sampling(n=4, temperature=1.0, max_tokens=max_tokens, min_tokens=min_tokens),
    )


class Ring:
    """The hub's socket and one actor; `say` and `hear` are the hub's side of the wire."""

    def __init__(self, model: str) -> None:
        self.socket = HubSocket()
        address = self.socket.start("127.0.0.1", HubKeys.make())
        config = Config(
            policy=PolicyConfig(model=model, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS),
            rollout=RolloutConfig(engine=tiny_engine(), max_requests_in_flight_per_actor=3),
            weights=WeightsConfig(backend=WeightBackend.gloo),
        )
        self.actor = RolloutActor("rollout-0", config, address)
        self.peer = b""
        self.hello: Hello | None = None

    async def hear(self, kind: type) -> Any:
        async with asyncio.timeout(30):
            while True:
                self.peer, message = await self.socket.receive()
                if isinstance(message, Hello):
                    self.hello = message
                if isinstance(message, kind):
                    return message

    async def say(self, message: msgspec.Struct) -> None:
        await self.socket.send(self.peer, encode(message))


def turn(model: str, scenario: Callable[[Ring], Awaitable[None]]) -> None:
    async def whole() -> None:
        ring = Ring(model)
        try:
            await scenario(ring)
        finally:
            await ring.actor.stop()
            ring.socket.close()

    asyncio.run(whole())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model("policy", tmp_path_factory.mktemp("model"))


def test_leases_become_groups_and_failures_become_answers(model: str, tmp_path: Path) -> None:
    async def scenario(ring: Ring) -> None:
        assert not (await ring.actor.health())["started"]
        first, again = await asyncio.gather(ring.actor.start(), ring.actor.start())
        assert first == again == {"name": "rollout-0", "model": model, "version": "0.0"}
        credit = await ring.hear(Credit)
        assert (credit.slots, credit.version) == (3, Version(0, 0))
        assert ring.hello is not None
        assert (ring.hello.role, ring.hello.name) == (Role.ROLLOUT, "rollout-0")

        image = noise_image(tmp_path, 131, 77)
        await ring.say(GenerateLease(lease=1, prompt=prompt(image)))
        made = await ring.hear(Generated)
        await ring.say(Ack(lease=1))
        assert made.lease == 1
        assert made.failure is None
        assert made.group.key == "train/0"
        assert made.group.actor == "rollout-0"
        assert made.group.image_sha256 == image.sha256
        assert len(made.group.captions) == 4
        for caption in made.group.captions:
            assert len(caption.logprobs) == len(caption.token_ids) <= 12
            assert (caption.finish is Finish.LENGTH) == (len(caption.token_ids) == 12) or caption.text
        assert made.group.started <= made.group.finished

        gone = ImageRef(sha256="0" * 64, path=str(tmp_path / "gone.png"))
        await ring.say(GenerateLease(lease=2, prompt=prompt(gone, 1)))
        failed = await ring.hear(Generated)
        await ring.say(Ack(lease=2))
        assert (failed.lease, failed.group) == (2, None)
        assert "gone.png" in failed.failure

        await ring.say(GenerateLease(lease=3, prompt=prompt(image, 2, max_tokens=150, min_tokens=150)))
        async with asyncio.timeout(60):
            while ring.actor.engine.stats().running == 0:
                await asyncio.sleep(0)
        await ring.say(Revoke(lease=3))
        await ring.hear(Generated)
        while ring.actor.engine.stats().running:
            await asyncio.sleep(0.005)

        health = await ring.actor.health()
        assert (health["started"], health["groups"], health["failures"]) == (True, 1, 1)
        assert len(await ring.actor.weights_fingerprint()) > 100

    turn(model, scenario)


def test_an_engine_that_dies_idle_ends_the_process(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    monkeypatch.setattr(rollout.os, "_exit", lambda code: ended.set() if code else None)
    monkeypatch.setattr(rollout.logging, "shutdown", lambda: None)

    async def scenario(ring: Ring) -> None:
        await ring.actor.start()
        ring.actor.engine.close()
        await asyncio.wait_for(ended.wait(), 10)

    turn(model, scenario)


def test_before_start_nothing_can_be_asked_of_the_engine(model: str) -> None:
    async def scenario(ring: Ring) -> None:
        assert repr(ring.actor) == "rollout-0"
        with pytest.raises(NotStarted, match="start"):
            await ring.actor.receive_weights(version="0.1")

    turn(model, scenario)


def test_the_rollout_process_imports_no_rllib_and_no_question() -> None:
    import subprocess
    import sys

    code = (
        "import caprl_async.rollout.actor, sys;"
        "print([m for m in sys.modules if m.startswith(('ray.rllib', 'vllm', 'caprl_async.judge'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
