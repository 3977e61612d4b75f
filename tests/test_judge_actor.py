"""The judge as an actor: leases in, verdicts out, never an image, and no life after its engine's death."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from judge_kit import CAPTION, ReferenceEngine, judge_config, question, save_random_judge

import caprl_async.judge.actor as actor_module
import caprl_async.replay.peer as peer_module
from caprl_async.choices import JudgeMode
from caprl_async.config import Config
from caprl_async.engine.types import EngineDied
from caprl_async.judge.actor import JudgeActor
from caprl_async.judge.judge import Judge
from caprl_async.types import Credit, Hello, Judged, JudgeLease, Outcome, Role

LEASE = JudgeLease(
    lease=3,
    key="train/0",
    attempt=0,
    captions=(CAPTION, "blue star ."),
    questions=(question(),),
    rotation=0,
)


class LonePeer:
    """Hands one lease to the actor in place of a hub."""

    last: LonePeer

    def __init__(self, address: Any, hello: Hello) -> None:
        self.hello = hello
        self.answered: asyncio.Future[Judged] = asyncio.get_running_loop().create_future()
        self.closed = False
        LonePeer.last = self

    async def serve(self, handle: Any, max_in_flight: int, stats: Any) -> None:
        Credit(slots=max_in_flight, **stats())
        self.answered.set_result(await handle(LEASE))
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, ReferenceEngine]:
    folder = save_random_judge(tmp_path / "judge")
    engine = ReferenceEngine(folder)
    config = Config(judge=judge_config(folder))
    config.evaluate.heldout_judge.model = str(folder)
    monkeypatch.setattr(actor_module.Judge, "load", lambda own, seed: Judge.on(engine, own))
    monkeypatch.setattr(peer_module, "Peer", LonePeer)
    return config, engine


def test_a_lease_is_answered_and_the_actor_stops(ring: tuple[Config, ReferenceEngine]) -> None:
    async def live() -> None:
        actor = JudgeActor("judge-0", "judge", ring[0], hub=None)
        assert repr(actor) == "judge-0"
        assert (await actor.health())["started"] is False
        assert await actor.start() == await actor.start()
        await asyncio.sleep(0)
        peer = LonePeer.last
        judged = await asyncio.wait_for(peer.answered, 20)
        assert (peer.hello.role, peer.hello.name, peer.hello.serves) == (Role.JUDGE, "judge-0", "judge")
        assert judged.lease == LEASE.lease
        assert [[v.outcome for v in row] for row in judged.verdicts or ()] == [[Outcome.SCORED]] * 2
        assert (await actor.health())["prompt_tokens"] > 0
        await actor.stop()
        await actor.stop()
        assert peer.closed

    asyncio.run(live())


def test_a_dead_engine_ends_the_process(
    ring: tuple[Config, ReferenceEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while nothing is asked, so that Ray starts a fresh one before the next lease."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(actor_module, "_WATCH_S", 0.01)

    async def live() -> None:
        actor = JudgeActor("judge-0", "judge", ring[0], hub=None)
        await actor.start()
        await asyncio.sleep(0)
        await asyncio.wait_for(LonePeer.last.answered, 20)
        assert exits == []
        ring[1].died = EngineDied("out of memory")
        while not exits:
            await asyncio.sleep(0.01)
        assert set(exits) == {1}
        before = len(exits)
        with pytest.raises(EngineDied):
            await actor.answer(msgspec.structs.replace(LEASE, rotation=1))
        assert len(exits) > before
        await actor.stop()

    asyncio.run(live())


def test_the_heldout_judge_differs_in_its_model_only() -> None:
    config = Config()
    config.judge.model, config.judge.draws, config.evaluate.heldout_judge.model = "mine", 3, "other"
    heldout = actor_module.judge_config(config, "heldout")
    assert (heldout.model, heldout.draws) == ("other", 3)
    assert config.judge.model == "mine"
    with pytest.raises(ValueError, match="heldout"):
        actor_module.judge_config(config, "held-out")


def test_no_message_to_a_judge_can_hold_an_image() -> None:
    """Promise 8: what reaches a judge is numbers and text, and unknown fields are refused."""
    leaves = _leaf_types(msgspec.inspect.type_info(JudgeLease))
    assert leaves == {"IntType", "FloatType", "StrType", "NoneType", "EnumType"}
    smuggled = {**msgspec.to_builtins(LEASE), "image": "aGVsbG8="}
    with pytest.raises(msgspec.ValidationError, match="image"):
        msgspec.convert(smuggled, JudgeLease)


def _leaf_types(info: Any) -> set[str]:
    if isinstance(info, msgspec.inspect.StructType):
        inner = [field.type for field in info.fields]
    elif isinstance(info, msgspec.inspect.UnionType):
        inner = list(info.types)
    elif isinstance(info, msgspec.inspect.VarTupleType):
        inner = [info.item_type]
    else:
        return {type(info).__name__}
    return set().union(*(_leaf_types(one) for one in inner))


def test_the_judge_process_imports_neither_rllib_nor_rollouts() -> None:
    code = (
        "import sys, caprl_async.judge.actor, caprl_async.replay.peer;"
        "bad = [m for m in sys.modules if m.startswith(('ray.rllib', 'caprl_async.rollout', 'PIL'))];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_held_out_judge_has_its_own_model_and_where_it_is_set_its_own_mode() -> None:
    config = Config()
    config.judge.model, config.judge.mode = "/one", JudgeMode.sample
    config.judge.endpoint.url = "http://127.0.0.1:1/v1"
    config.evaluate.heldout_judge.model = "/other"
    heldout = actor_module.judge_config(config, "heldout")
    assert (heldout.model, heldout.mode, heldout.endpoint.url) == ("/other", JudgeMode.sample, "")
    config.evaluate.heldout_judge.mode = JudgeMode.likelihood
    assert actor_module.judge_config(config, "heldout").mode is JudgeMode.likelihood
    assert actor_module.judge_config(config, "judge").mode is JudgeMode.sample
