"""The face that RLlib users know: build, train, evaluate, save, go back, stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from caprl_async import conf
from caprl_async.ring import cluster
from caprl_async.types import Version

SMALL = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.dense_policy="]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_algorithm_trains_evaluates_saves_and_goes_back(tmp_path: Path) -> None:
    from caprl_async.algorithm import CapRL, CapRLConfig

    sizes = ["steps=9", "replay.batch_groups=4", "evaluate.images=8"]
    config = conf.load(["conf=conf/demo.yaml", f"run_dir={tmp_path / 'run'}", *SMALL, *sizes])
    cluster.connect(config.ring, log_level="WARNING")
    algorithm = CapRLConfig().conf(config).build_algo()
    try:
        assert isinstance(algorithm, CapRL)
        for step in (1, 2):
            result = algorithm.train()
            assert result["training_iteration"] == step
            assert 0 <= result["caprl"]["reward_mean"] <= 1
            assert result["num_env_steps_trained_lifetime"] == step * 4 * 8
        measured = algorithm.evaluate()["caprl"]
        assert measured["images"] == 8
        assert 0 < measured["judges"]["judge"]["accuracy"] <= 1
        assert measured["length"] > 0

        path = algorithm.save_to_path(str(tmp_path / "cut"))
        algorithm.train()
        assert algorithm.ring.version == Version(0, 3)
        algorithm.restore_from_path(path)
        assert algorithm.ring.version == Version(1, 2)
        algorithm.train()
        assert algorithm.ring.version == Version(1, 3)
        learner, engine = algorithm.ring.learners[0], algorithm.ring.rollouts[0]
        algorithm.evaluate()  # waits until the engines have the newest weights
        ring = algorithm.ring
        assert ring.get(learner.weights_fingerprint.remote()) == ring.get(engine.weights_fingerprint.remote())
    finally:
        algorithm.stop()
        cluster.disconnect()
