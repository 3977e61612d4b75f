"""The ring in other settings than the demo's, with a killed engine, and with data it cannot use."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caprl_async import conf
from caprl_async.ring import cluster
from caprl_async.ring.errors import RingFailed
from caprl_async.ring.supervisor import Supervisor

SMALL = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.dense_policy="]

LETTERS = "judge.model=pkg:tiny/models/judge_letters"
LENGTHS = ["reward.length_free=0", "reward.length_max=40"]


@pytest.fixture
def stopped() -> Iterator[list[Supervisor]]:
    """Rings put in here are stopped after the test."""
    rings: list[Supervisor] = []
    yield rings
    for ring in rings:
        ring.stop()
    cluster.disconnect()


def _pid(handle: Any) -> int:
    import ray

    return int(ray.get(handle.__ray_call__.remote(lambda _: os.getpid())))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ["rollouts", "judges"])
def test_a_killed_engine_comes_back_and_nothing_is_lost(
    role: str, tmp_path: Path, stopped: list[Supervisor]
) -> None:
    said: list[str] = []
    config = conf.load(
        ["conf=conf/demo.yaml", f"run_dir={tmp_path}", "steps=8", "replay.batch_groups=8", *SMALL]
    )
    ring = Supervisor(config, say=said.append)
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    for _ in range(2):
        ring.step()
    os.kill(_pid(getattr(ring, role)[0]), signal.SIGKILL)
    for _ in range(6):
        ring.step()
    ring.finish()
    assert any("starting it again" in text for text in said)
    audit = ring.audit()
    assert audit["violations"] == []
    assert audit["ended"]["trained"] == 8 * 8
    learner = ring.get(ring.learners[0].weights_fingerprint.remote())
    assert ring.get(ring.rollouts[0].weights_fingerprint.remote()) == learner


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        ["replay.max_staleness=0"],
        ["learner.num_ranks=2", "learner.zero_stage=1", "rollout.num_actors=2"],
        # With so few draws captions are often equal; their lengths tell them apart.
        [LETTERS, "judge.mode=sample", "judge.draws=4", "learner.kl.coef=0.01", "reward.length=1", *LENGTHS],
        [LETTERS, "judge.mode=expected", "learner.updates_per_batch=2", "learner.zero_stage=3"],
    ],
    ids=["synchronous", "two ranks and two rollouts", "sample", "expected"],
)
def test_the_ring_turns_in_other_settings(
    overrides: list[str], tmp_path: Path, stopped: list[Supervisor]
) -> None:
    arguments = ["conf=conf/demo.yaml", f"run_dir={tmp_path}", "steps=3", "replay.batch_groups=4"]
    config = conf.load([*arguments, *SMALL, *overrides])
    ring = Supervisor(config)
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    steps = [ring.step() for _ in range(3)]
    ring.finish()
    assert all(math.isfinite(step["loss"]) and step["groups"] == 4 for step in steps)
    if config.replay.max_staleness == 0:
        for step in steps:
            assert step["staleness_max"] == 0
            assert step["logprob_gap_fresh_max"] < 1e-3
            assert step["importance_max"] == pytest.approx(1.0, abs=1e-3)
    learner = ring.get(ring.learners[0].weights_fingerprint.remote())
    for rollout in ring.rollouts:
        assert ring.get(rollout.weights_fingerprint.remote()) == learner


@pytest.mark.slow
def test_a_judge_that_cannot_answer_ends_the_run_with_the_reason(
    tmp_path: Path, stopped: list[Supervisor]
) -> None:
    overrides = ["judge.mode=sample", "replay.batch_groups=4", "replay.max_evicted_batches=2"]
    ring = Supervisor(conf.load(["conf=conf/demo.yaml", f"run_dir={tmp_path}", *SMALL, *overrides]))
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    with pytest.raises(RingFailed, match=r"filtered groups were evicted.*judge\.mode"):
        ring.step()


@pytest.mark.slow
def test_unusable_data_is_one_error_that_names_the_file(tmp_path: Path, stopped: list[Supervisor]) -> None:
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"id": ["1"], "prompt": ["x"]}), bad)
    config = conf.load(["conf=conf/demo.yaml", f"run_dir={tmp_path / 'run'}", f"data.train={bad}", *SMALL])
    ring = Supervisor(config)
    stopped.append(ring)
    with pytest.raises(RingFailed, match=r"bad\.parquet") as caught:
        ring.start()
    assert "\n" not in str(caught.value)
