"""The ring in other settings than the demo's, with a killed engine, and with data it cannot use."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from process_kit import left_running

from caprl_async import conf, processes
from caprl_async.ring import cluster
from caprl_async.ring.checkpoints import RING
from caprl_async.ring.errors import RingFailed
from caprl_async.ring.supervisor import Supervisor
from caprl_async.types import Version

SMALL = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.dense_policy="]

LETTERS = "judge.model=pkg:tiny/models/judge_letters"
LENGTHS = ["reward.length_free=0", "reward.length_max=40"]
TWO = ["learner.num_ranks=2", "learner.zero_stage=1", "rollout.num_actors=2"]
KL = ["learner.kl.coef=0.01"]


_ASKED = "select judged.peer, events.prompt_index from judged join events using (seq)"


def _pid(handle: Any) -> int:
    import ray

    return int(ray.get(handle.health.remote())["pid"])


def _checkpoint(ring: Supervisor) -> None:
    folder = ring.checkpoints.begin(ring.version.step)
    ring.save(folder / RING)
    ring.checkpoints.finish(folder, {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whoever_is_killed_or_hangs_comes_back_and_nothing_is_lost(
    tmp_path: Path, stopped: list[Supervisor]
) -> None:
    """Kills of rollout and queue: test_tools_chaos.py."""
    said: list[str] = []
    short = ["ring.hang_timeout_s=10", "replay.peer_timeout_s=5", "observe.record_batches=true"]
    short += ["judge.num_actors=2", "judge.also=[pkg:tiny/models/heldout_judge]"]
    config = conf.load(
        ["conf=conf/demo.yaml", f"run_dir={tmp_path}", "steps=20", "replay.batch_groups=4", *SMALL, *short]
    )
    ring = Supervisor(config, say=said.append)
    stopped.append(ring)
    ring.start()
    ring.open_admission()

    def turn(steps: int) -> None:
        for _ in range(steps):
            ring.step()

    def hit(handle: Any, sign: signal.Signals) -> None:
        os.kill(_pid(handle), sign)
        turn(3)

    turn(1)
    hit(ring.judges[0], signal.SIGKILL)
    assert ring.version == Version(0, 4)
    _checkpoint(ring)
    turn(2)
    hit(ring.learners[0], signal.SIGKILL)
    assert ring.version == Version(1, 7), "it went back to step 4"
    hit(ring.hub, signal.SIGSTOP)
    hit(ring.learners[0], signal.SIGSTOP)
    assert ring.version == Version(2, 7)
    ring.finish()

    assert "judge-0 died; starting it again" in said
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        asked = {(peer, index % 2) for peer, index in ledger.execute(_ASKED)}
    assert asked == {("judge-0", 0), ("judge-1", 1)}, "two models take turns"
    assert sum("no sign of life" in text for text in said) == 2
    audit = ring.audit()
    assert (audit["violations"], audit["lost"], audit["doubled"]) == ([], 0, 0)
    assert audit["ended"]["trained"] == 7 * 4
    learner = ring.get(ring.learners[0].weights_fingerprint.remote())
    assert ring.get(ring.rollouts[0].weights_fingerprint.remote()) == learner


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_damaged_checkpoint_is_passed_over_and_without_any_it_begins_again(
    tmp_path: Path, stopped: list[Supervisor]
) -> None:
    said: list[str] = []
    arguments = ["conf=conf/demo.yaml", f"run_dir={tmp_path}", "replay.batch_groups=4", *SMALL]
    ring = Supervisor(conf.load([*arguments, "learner.num_ranks=2"]), say=said.append)
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    ring.step()
    start = ring.get(ring.learners[0].weights_fingerprint.remote())
    os.kill(_pid(ring.learners[1]), signal.SIGKILL)
    ring.step()
    assert ring.version == Version(1, 1)
    assert any("back to the start" in text for text in said)
    assert ring.get(ring.learners[0].weights_fingerprint.remote()) != start  # other captions, other weights
    _checkpoint(ring)
    ring.step()
    _checkpoint(ring)
    weights = tmp_path / "checkpoints" / "step-000002" / RING / "trainer" / "state"
    (damaged,) = weights.glob("mp_rank_00*")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    os.kill(_pid(ring.learners[0]), signal.SIGKILL)
    ring.step()
    assert any("is damaged" in text and damaged.name in text for text in said)
    assert ring.version == Version(2, 2)
    ring.finish()
    audit = ring.audit()
    assert (audit["violations"], audit["ended"]["trained"]) == ([], 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        # With so few draws captions are often equal; their lengths tell them apart.
        [LETTERS, "judge.mode=sample", "judge.draws=4", "reward.length=1", *LENGTHS, *TWO],
        [LETTERS, "judge.mode=expected", "learner.updates_per_batch=2", "learner.zero_stage=3", *KL],
    ],
    ids=["sample, two ranks and two rollouts", "expected, two updates, ZeRO 3"],
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
    learner = ring.get(ring.learners[0].weights_fingerprint.remote())
    for rollout in ring.rollouts:
        assert ring.get(rollout.weights_fingerprint.remote()) == learner


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_of_two_workers_get_whole_updates_and_leave_nothing(
    tmp_path: Path, stopped: list[Supervisor]
) -> None:
    """Tensor parallelism: at lag 0 what the shards sample is what the learner computes."""
    before = processes.descendants()
    split = ["rollout.engine.tensor_parallel_size=2", "judge.engine.tensor_parallel_size=2"]
    arguments = [
        "conf=conf/demo.yaml",
        f"run_dir={tmp_path}",
        "replay.batch_groups=4",
        "replay.max_staleness=0",
    ]
    ring = Supervisor(conf.load([*arguments, *SMALL, *split]))
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    steps = [ring.step() for _ in range(3)]
    assert [step["staleness_mean"] for step in steps] == [0.0] * 3
    assert max(step["logprob_gap_max"] for step in steps) < 1e-3
    assert all(0 < step["reward_mean"] < 1 for step in steps)
    ring.finish()
    ring.stop()
    cluster.disconnect()
    assert left_running(before) == []


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
