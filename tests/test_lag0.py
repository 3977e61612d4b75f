"""With `max_staleness: 0` the ring computes what a plain synchronous program computes, step by step.

The tolerances are stated and explained in docs/correctness.md.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
import torch
from learner_kit import plain_reference
from sync_reference import replay
from transformers import AutoModelForImageTextToText

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.data.load import load_rows
from caprl_async.data.sampler import PromptSampler
from caprl_async.learner.advantages import batch_advantages
from caprl_async.replay.events import Event
from caprl_async.replay.samples import recorded_batch
from caprl_async.ring import cluster
from caprl_async.ring.supervisor import Supervisor
from caprl_async.types import Evicted, TrainBatch, Version

pytestmark = pytest.mark.slow

STEPS = 5
LOGPROB_TOLERANCE = 1e-4  # nats; float32 in both programs, other kernels and another order of summation
REWARD_TOLERANCE = 1e-6  # the same numbers, added in another order
PARAMETER_TOLERANCE = 3e-4  # of the distance from the start, as a norm over all parameters


class Synchronous:
    """What a run with `max_staleness: 0` left behind."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.metrics: list[dict[str, float]] = []

    @property
    def batch_files(self) -> list[Path]:
        return sorted((self.run_dir / "batches").iterdir())

    @property
    def batches(self) -> list[TrainBatch]:
        return [recorded_batch(path) for path in self.batch_files]

    def parameters(self, step: int) -> dict[str, torch.Tensor]:
        """After `step` steps."""
        folder = Path(self.config.policy.model) if step == 0 else self.run_dir / f"cut-{step}" / "hf"
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        return dict(model.named_parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Synchronous:
    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={tmp_path_factory.mktemp('lag0')}", f"steps={STEPS}"),
            *("replay.max_staleness=0", "replay.batch_groups=8", "observe.record_batches=true"),
            # So wide that a good part of the groups is filtered and refilled.
            *("replay.min_reward_spread=0.55", "evaluate.dense_policy="),
            *("evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
        ]
    )
    done = Synchronous(config)
    ring = Supervisor(config)
    try:
        ring.start()
        ring.open_admission()
        for step in range(1, STEPS + 1):
            done.metrics.append(ring.step())
            ring.save(done.run_dir / f"cut-{step}")
        ring.finish()
    finally:
        ring.stop()
        cluster.disconnect()
    return done


def test_every_token_is_of_the_version_that_trains_on_it(run: Synchronous) -> None:
    assert [batch.version for batch in run.batches] == [Version(0, step) for step in range(STEPS)]
    for batch in run.batches:
        spans = [s for scored in batch.groups for c in scored.group.captions for s in c.spans]
        assert {span.version for span in spans} == {batch.version}


def test_batches_are_the_samplers_next_prompts_and_declared_refills(run: Synchronous) -> None:
    with sqlite3.connect(run.run_dir / "ledger.sqlite") as ledger:
        ended = ledger.execute("select key, detail from events where event = ?", (Event.EVICTED.value,))
        evicted = {int(key.rpartition("/")[2]): json.loads(detail)["reason"] for key, detail in ended}
    rows = load_rows(run.config.data.train, run.config.judge.prompt.abstain)
    sampler = PromptSampler(rows, run.config.seed, run.config.data.shuffle)
    taken = [scored.index for batch in run.batches for scored in batch.groups]
    assert evicted, "nothing was refilled, so this shows nothing"
    assert set(evicted.values()) == {Evicted.FILTERED.value}
    assert taken == [index for index in range(taken[-1] + 1) if index not in evicted]
    for batch in run.batches:
        for scored in batch.groups:
            assert scored.row_id == sampler.row_at(scored.index).row_id


def test_ratios_are_one(run: Synchronous) -> None:
    for step in run.metrics:
        assert step["ratio_max"] == pytest.approx(1.0, abs=1e-6)
        assert step["importance_max"] == pytest.approx(1.0, abs=2 * LOGPROB_TOLERANCE)
        assert step["importance_min"] == pytest.approx(1.0, abs=2 * LOGPROB_TOLERANCE)
        assert step["effective_samples"] == pytest.approx(1.0, abs=1e-6)
        assert step["clip_fraction"] == 0.0


def test_a_synchronous_program_of_100_lines_comes_to_the_same(run: Synchronous) -> None:
    learner = run.config.learner
    start = {name: p.detach() for name, p in run.parameters(0).items()}
    for step, (_, found) in enumerate(replay(run.batch_files, plain_reference(run.config)), 1):
        batch = run.batches[step - 1]
        for scored, rewards in zip(batch.groups, found.rewards, strict=True):
            assert [p.total for p in scored.rewards] == pytest.approx(rewards, abs=REWARD_TOLERANCE)
        ours_of = [[(p.total or 0.0,) for p in scored.rewards] for scored in batch.groups]
        ours_now = batch_advantages(ours_of, learner.advantage, (1.0,))
        for mine, theirs in zip(ours_now, found.advantages, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)  # a small spread magnifies the rewards' 1e-6
        assert found.gap < LOGPROB_TOLERANCE
        ours = {name: p.detach() for name, p in run.parameters(step).items()}
        assert set(ours) == set(found.parameters)
        moved = sum((ours[n] - start[n]).double().square().sum() for n in ours).sqrt()
        apart = sum((ours[n] - found.parameters[n]).double().square().sum() for n in ours).sqrt()
        assert moved > 0
        print(f"step {step}: log-probabilities {found.gap:.1e}, parameters {apart / moved:.1e} apart")
        assert apart / moved < PARAMETER_TOLERANCE, f"step {step}: {apart / moved:.1e} of the way apart"
