"""Small run folders as the hub leaves them, with made-up peers, for the tests of jobs that read a run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from replay_kit import StubJudge, StubLearner, StubRollout, connected, make_config, run, running, unscored

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.learner.batch import caption_name
from caprl_async.learner.recount import advantages
from caprl_async.types import Judged, JudgeLease, Outcome, TrainBatch, Version

FILTERED, UNSCORABLE, UNFINISHED = "train/1", "train/2", "train/3"
"""Prompts that `PickyJudge` finds equal, cannot score, and half scores."""


class PickyJudge(StubJudge):
    """Scores like its base, but for three prompts."""

    async def handle(self, lease: JudgeLease) -> Judged:
        answer = await super().handle(lease)
        assert answer.verdicts is not None
        rows = answer.verdicts
        if lease.key == FILTERED:
            rows = (rows[1],) * len(rows)
        elif lease.key == UNSCORABLE:
            rows = unscored(lease.questions, len(lease.captions), Outcome.UNSCORABLE)
        elif lease.key == UNFINISHED:  # the first caption has no quorum, and leaves its group
            bad = unscored(lease.questions, 1, Outcome.UNSCORABLE)[0]
            rows = (tuple(msgspec.structs.replace(v, reason="two options") for v in bad), *rows[1:])
        return msgspec.structs.replace(answer, verdicts=rows)


def recorded_config(folder: Path) -> Config:
    config = make_config(folder, rows=40)
    config.run_dir = str(folder / "run")
    config.observe.record_batches = True
    config.learner.device = "cpu"
    return config


async def record(config: Config, steps: int, back_to: int | None = None, more: int = 0) -> list[TrainBatch]:
    """Turns a hub for `steps` steps; then goes back to a cut taken at `back_to`, and `more` steps on."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(exist_ok=True)
    conf.dump(config, run_dir / conf.RESOLVED)
    rollout, batches = StubRollout(), []
    async with running(config, run_dir) as (queue, address), connected(address, rollout, PickyJudge()):
        learner = StubLearner(address)
        await queue.open_admission()

        async def step(version: Version) -> None:
            batch = await learner.batch(version)
            batches.append(batch)
            made = Version(version.epoch, version.step + 1)
            known = advantages(batch, config)
            assert known is not None
            told = [
                [known.get(caption_name(g.group, i), 0.0) for i in range(len(g.group.captions))]
                for g in batch.groups
            ]
            await queue.trained(made, 10.0 + version.step, 11.0 + version.step, told)
            rollout.version = made

        for number in range(steps):
            if number == back_to:
                await save(queue, run_dir, number)
            await step(Version(0, number))
        if back_to is not None:
            begun = Version(1, back_to)
            await queue.restore(str(cut(run_dir, back_to)), begun)
            rollout.version = begun
            for number in range(back_to, back_to + more):
                await step(Version(1, number))
        await asyncio.sleep(0.1)  # what is in flight comes in
    return batches


def cut(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}" / "learner_group"


async def save(queue: Any, run_dir: Path, step: int) -> None:
    cut(run_dir, step).mkdir(parents=True)
    await queue.save(str(cut(run_dir, step)))


@dataclass(frozen=True)
class Recorded:
    """A run of four steps that went back to the second and came to the fourth again."""

    config: Config
    batches: list[TrainBatch]  # in the order of their cuts; those of the steps that were rolled back too

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def ledger(self) -> Path:
        return self.run_dir / "ledger.sqlite"


def recorded(folder: Path, steps: int = 4, back_to: int | None = 2, more: int = 2) -> Recorded:
    config = recorded_config(folder)
    return Recorded(config, run(record(config, steps, back_to, more)))
