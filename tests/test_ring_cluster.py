"""A ring on a cluster of several nodes, which come and go while it turns."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.jobs.scaling import ScaleError, ScaleFile, Wanted
from caprl_async.ring.checkpoints import RING
from caprl_async.ring.extras import Extras
from caprl_async.ring.supervisor import Supervisor
from caprl_async.types import Version

SMALL = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.dense_policy="]


def _node(actor: Any) -> str:
    """The node that an actor is on."""
    from ray._private.state import actors

    return str(actors(actor._actor_id.hex())["Address"]["NodeID"])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster on this machine; its head has no room for actors."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs longer than Ray's 30
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    ray.shutdown()
    made.shutdown()


def _turn_until(ring: Supervisor, done: Callable[[dict[str, float]], bool], what: str) -> None:
    """Steps now and then: what starts meanwhile needs the cores too."""
    deadline = time.monotonic() + 180
    while not done(ring.step()):
        assert time.monotonic() < deadline, what
        for _ in range(8):
            ring._pause()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_join_and_leave_a_ring_that_turns(
    tmp_path: Path, nodes: Any, stopped: list[Supervisor]
) -> None:
    """Each on the nodes with its role's label; one leaves with its node and comes back with another."""
    said: list[str] = []
    engines = nodes.add_node(num_cpus=1, num_gpus=2, labels={"caprl": "engines"})
    other = nodes.add_node(num_cpus=1, labels={"caprl": "learner"})
    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={tmp_path}", "replay.batch_groups=4", *SMALL),
            *(f"ring.address={nodes.address}", "ring.gpus_per_rollout=1", "ring.gpus_per_judge=1"),
            *(f"ring.{role}_label=caprl=engines" for role in ("rollout", "judge")),
            *("ring.learner_label=caprl=learner", "rollout.max_actors=2"),
        ]
    )
    ring = Supervisor(config, say=said.append)
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    assert ring.step()["alive_rollout"] == 1
    assert _node(ring.rollouts[0]) == _node(ring.judges[0]) == engines.node_id
    assert _node(ring.learners[0]) == other.node_id

    def equal_weights() -> bool:
        ring.weights.settle()
        learner = ring.get(ring.learners[0].weights_fingerprint.remote())
        return all(ring.get(each.weights_fingerprint.remote()) == learner for each in ring.rollouts)

    first = nodes.add_node(num_cpus=1, num_gpus=1, labels={"caprl": "engines"})
    _turn_until(ring, lambda step: step["alive_rollout"] == 2, "rollout-1 has not joined")
    assert _node(ring.rollouts[1]) == first.node_id
    assert equal_weights()

    nodes.remove_node(first, allow_graceful=False)
    for _ in range(3):
        ring.step()
    second = nodes.add_node(num_cpus=1, num_gpus=2, labels={"caprl": "engines"})
    ring.scale(judges=2)
    _turn_until(ring, lambda step: step["alive_judge"] == 2, "judge-1 has not joined")
    _turn_until(ring, lambda _: said.count("rollout-1 is back") == 2, "rollout-1 has not come back")
    assert _node(ring.rollouts[1]) == _node(ring.judges[1]) == second.node_id
    ring.step()
    assert equal_weights()

    ring.scale(rollouts=1, judges=1)
    _turn_until(ring, lambda step: step["alive_rollout"] == step["alive_judge"] == 1, "they have not left")
    assert (len(ring.rollouts), len(ring.judges)) == (1, 1)
    ring.finish()
    audit = ring.audit()
    assert (audit["violations"], audit["lost"], audit["doubled"]) == ([], 0, 0)
    ring.stop()


@pytest.mark.parametrize(
    ("text", "said"),
    [("rollout: 3", "unknown field `rollout`"), ("rollouts: many", "int"), ("rollouts: [", "scale.yaml")],
)
def test_a_scale_file_that_cannot_be_followed_is_told_once(tmp_path: Path, text: str, said: str) -> None:
    file = ScaleFile(tmp_path)
    assert file.news() is None
    (tmp_path / "scale.yaml").write_text(text)
    with pytest.raises(ScaleError, match=said):
        file.news()
    assert file.news() is None
    (tmp_path / "scale.yaml").write_text("rollouts: 3\n")
    assert file.news() == Wanted(rollouts=3)


def test_a_ring_keeps_the_engines_that_it_has_started_with() -> None:
    config = Config()
    config.rollout.num_actors = 2
    with pytest.raises(ValueError, match="1 rollouts wanted, but the ring has started with 2"):
        Extras(config).want("rollout", 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_lost_is_made_up_for_by_another(
    tmp_path: Path, nodes: Any, stopped: list[Supervisor]
) -> None:
    """Everything but the driver may lie on it: queue, engines, learner."""
    first = nodes.add_node(num_cpus=2)
    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={tmp_path}", "replay.batch_groups=4", *SMALL),
            f"ring.address={nodes.address}",
        ]
    )
    ring = Supervisor(config)
    stopped.append(ring)
    ring.start()
    ring.open_admission()
    for _ in range(2):
        ring.step()
    folder = ring.checkpoints.begin(ring.version.step)
    ring.save(folder / RING)
    ring.checkpoints.finish(folder, {})
    nodes.add_node(num_cpus=2)
    nodes.remove_node(first, allow_graceful=False)
    while ring.version < Version(1, 5):  # a step that the dead learner still made comes again
        ring.step()
    ring.finish()
    audit = ring.audit()
    assert (audit["violations"], audit["ended"]["trained"]) == ([], 5 * 4)
    ring.stop()
