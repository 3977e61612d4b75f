"""The face that RLlib users know: build, train, evaluate, save, go back, stop."""

from __future__ import annotations

import shutil
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
        algorithm.stop()
        del algorithm

        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)  # it needs its own alone
        algorithm = CapRL.from_checkpoint(path)
        assert algorithm.iteration == 2
        assert algorithm.ring.version == Version(2, 2)
        assert algorithm.train()["training_iteration"] == 3
    finally:
        algorithm.stop()
        cluster.disconnect()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tune_runs_trials_one_after_the_other_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray import tune

    from caprl_async.algorithm import CapRL, CapRLConfig

    config = conf.load(["conf=conf/demo.yaml", f"run_dir={tmp_path / 'unused'}", *SMALL])
    space = (
        CapRLConfig()
        .conf(config)
        .environment(heldout="")
        .training(lr=tune.grid_search([1e-4, 3e-4]), batch_groups=4)
    )
    storage = tmp_path / "results"
    before = set(Path.home().iterdir()), set(Path.cwd().iterdir())
    cluster.connect(config.ring, log_level="ERROR")
    try:
        tuner = tune.Tuner(
            CapRL,
            param_space=space,
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(
                name="lr", storage_path=str(storage), stop={"training_iteration": 2}, verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            ),
        )  # fmt: skip
        results = tuner.fit()
        assert not results.errors
        assert len(results) == 2
        assert {one.config["caprl"]["learner"]["lr"] for one in results} == {1e-4, 3e-4}
        assert all(one.metrics["training_iteration"] == 2 for one in results)
        assert all(0 <= one.metrics["caprl"]["reward_mean"] <= 1 for one in results)
        for one in results:
            assert one.checkpoint is not None
            assert (Path(one.path) / "ledger.sqlite").is_file(), "what a ring writes is in its trial"
        best = results.get_best_result("caprl/reward_mean", "max")
        assert best.config["caprl"]["data"]["heldout"] == ""

        assert tune.Tuner.can_restore(str(storage / "lr"))
        again = tune.Tuner.restore(str(storage / "lr"), trainable=CapRL, param_space=space)
        assert len(again.get_results()) == 2
    finally:
        cluster.disconnect()
    assert not (tmp_path / "unused").exists()
    assert (set(Path.home().iterdir()), set(Path.cwd().iterdir())) == before
    told = capfd.readouterr()
    print(told.out, told.err)
    assert "arning" not in told.err
