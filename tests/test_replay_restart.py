"""The hub goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from replay_kit import StubJudge, StubLearner, StubRollout, connected, make_config, run, running, turn

from caprl_async.types import Version


def test_a_restart_from_a_cut_trains_every_prompt_once(tmp_path: Path) -> None:
    async def first_life(config: Any) -> None:
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            await queue.save(str(tmp_path))
            await turn(queue, learner, rollout, 1)  # after the cut: lost
            learner.close()

    async def second_life(config: Any) -> None:
        rollout = StubRollout(incarnation="2")
        rollout.version = Version(1, 1)
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.restore(str(tmp_path), Version(1, 1))
            await queue.open_admission()
            trained: list[int] = []
            for step in (1, 2, 3):
                batch = await turn(queue, learner, rollout, step, epoch=1)
                trained += [scored.index for scored in batch.groups]
            assert sorted(trained) == list(range(4, 16))
            audit = await queue.audit()
            assert audit["violations"] == []
            assert audit["ended"] == {"trained": 16}
            learner.close()

    config = make_config(tmp_path)
    run(first_life(config))
    config.resume = True
    run(second_life(config))


def test_a_checkpoint_goes_on_in_another_run_folder(tmp_path: Path) -> None:
    async def begin(config: Any) -> None:
        rollout = StubRollout()
        async with (
            running(config, tmp_path / "a") as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            learner.close()
            await queue.save(str(tmp_path))

    async def go_on(config: Any) -> None:
        rollout = StubRollout()
        rollout.version = Version(1, 1)
        async with (
            running(config, tmp_path / "b") as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            learner = StubLearner(address)
            await queue.restore(str(tmp_path), Version(1, 1))
            await queue.open_admission()
            batch = await learner.batch(Version(1, 1))
            assert sorted(scored.index for scored in batch.groups) == [4, 5, 6, 7]
            assert (await queue.audit())["violations"] == []
            learner.close()

    config = make_config(tmp_path)
    run(begin(config))
    run(go_on(config))
