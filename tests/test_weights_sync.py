"""WeightSync with real Ray actors: transfers beside training, coalescing, dead and dirty engines."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayActorError
from weights_kit import StubEngine

from caprl_async.config import WeightBackend, WeightsConfig
from caprl_async.types import Version
from caprl_async.weights.receiver import open_receiver, receive
from caprl_async.weights.sender import WeightSender
from caprl_async.weights.sync import WeightSync
from caprl_async.weights.types import LearnerLost, SyncReport

CONFIG = WeightsConfig(backend=WeightBackend.gloo, timeout_s=15.0)


@ray.remote(num_cpus=0.01, max_concurrency=4)
class Learner:
    def __init__(self) -> None:
        self.sender = WeightSender()
        self.sent: list[Version] = []

    def open_weight_group(self, **info: Any) -> list[dict[str, Any]]:
        return self.sender.open(**info)

    def send_weights(self, version: Version) -> float:
        self.sent.append(version)
        return self.sender.send(version, {"w": torch.full((1000,), float(version.step))})

    def train(self, seconds: float) -> None:
        time.sleep(seconds)

    def history(self) -> list[Version]:
        return self.sent


@ray.remote(num_cpus=0.01, max_restarts=-1)
class Rollout:
    def __init__(self) -> None:
        self.engine: Any = StubEngine()
        self.delay = 0.0

    def join_weight_group(self, **info: Any) -> None:
        open_receiver(self.engine, info)

    def receive_weights(self, version: str, **info: Any) -> dict[str, float]:
        time.sleep(self.delay)
        if self.engine.fail_in == "die":
            os._exit(1)
        return receive(self.engine, info, version)

    def renew(self) -> None:
        self.__init__()  # type: ignore[misc]

    def set(self, fail_in: str = "", delay: float = 0.0) -> None:
        self.engine.fail_in, self.delay = fail_in, delay

    def state(self) -> tuple[str, float, bool]:
        weights = self.engine.weights.get("w", torch.zeros(1))
        return self.engine.version, float(weights.mean()), self.engine.paused


@pytest.fixture(scope="module")
def actors() -> Iterator[tuple[Any, dict[str, Any]]]:
    """One set for all tests: a process costs seconds of imports."""
    # Ray reads it once a process: the same that a ring of another test had.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 1024 * 1024,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield Learner.remote(), {f"rollout-{k}": Rollout.remote() for k in range(2)}
    ray.shutdown()


@pytest.fixture
def ring(actors: Any) -> Iterator[tuple[WeightSync, Any, dict[str, Any]]]:
    learner, engines = actors
    ray.get([engine.renew.remote() for engine in engines.values()])
    sync = WeightSync(CONFIG, learner, engines)
    yield sync, learner, engines
    sync.close()


def wait_until_restarted(engine: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return ray.get(engine.renew.remote())
        except RayActorError:
            assert time.monotonic() < deadline, "Ray does not restart the engine"
            time.sleep(0.2)


def states(engines: dict[str, Any]) -> list[tuple[str, float, bool]]:
    return ray.get([engine.state.remote() for engine in engines.values()])


def test_a_publish_reaches_every_engine_while_the_learner_trains(ring: Any) -> None:
    sync, learner, engines = ring
    assert sync.open() == {}
    training = learner.train.remote(30.0)
    report = sync.publish(Version(0, 1))
    assert ray.wait([training], timeout=0)[0] == []
    assert (report.announced, report.failed, report.error) == (True, {}, None)
    assert set(report.engines) == set(engines)
    assert all(0 < seconds <= report.seconds for seconds in report.engines.values())
    assert states(engines) == [("0.1", 1.0, False)] * 2


def test_of_the_versions_that_wait_only_the_newest_is_sent(ring: Any) -> None:
    sync, learner, engines = ring
    sync.open()
    ray.get([engine.set.remote(delay=0.5) for engine in engines.values()])
    before = len(ray.get(learner.history.remote()))
    futures = [sync.publish_soon(Version(0, step)) for step in range(1, 6)]
    reports: list[SyncReport] = [future.result() for future in futures]
    assert reports[-1].version == Version(0, 5)
    assert len(ray.get(learner.history.remote())) - before <= 2
    assert states(engines) == [("0.5", 5.0, False)] * 2


def test_a_dying_engine_is_reported_and_the_other_gets_the_version(ring: Any) -> None:
    sync, _, engines = ring
    sync.open()
    ray.get(engines["rollout-1"].set.remote(fail_in="die"))
    report = sync.publish(Version(0, 1))
    assert set(report.failed) == {"rollout-1"}
    assert report.announced
    assert report.error is not None
    assert report.seconds < CONFIG.timeout_s  # the driver saw the death and cancelled the wait
    assert ray.get(engines["rollout-0"].state.remote()) == ("0.1", 1.0, False)

    wait_until_restarted(engines["rollout-1"])
    assert sync.open() == {}
    assert sync.publish(Version(0, 1)).announced
    assert states(engines) == [("0.1", 1.0, False)] * 2


def test_a_group_that_all_have_left_has_no_members_and_blames_nobody_again(ring: Any) -> None:
    sync, _, engines = ring
    sync.open()
    ray.get([engine.set.remote(fail_in="die") for engine in engines.values()])
    assert set(sync.publish(Version(0, 1)).failed) == set(engines)
    report = sync.publish(Version(0, 2))
    assert (report.announced, report.failed, report.members) == (False, {}, 0)
    for engine in engines.values():
        wait_until_restarted(engine)
    assert sync.open() == {}
    assert sync.publish(Version(0, 2)).members == 2
    assert states(engines) == [("0.2", 2.0, False)] * 2


def test_a_dirty_engine_is_reported_and_stays_paused(ring: Any) -> None:
    sync, _, engines = ring
    sync.open()
    ray.get(engines["rollout-0"].set.remote(fail_in="finish_weight_update"))
    report = sync.publish(Version(0, 1))
    assert set(report.failed) == {"rollout-0"}
    assert "finish_weight_update was made to fail" in report.failed["rollout-0"]
    assert report.announced
    assert states(engines) == [("start", 0.0, True), ("0.1", 1.0, False)]


def test_an_engine_that_refuses_keeps_the_version_from_being_announced(ring: Any) -> None:
    sync, _, engines = ring
    sync.open()
    ray.get(engines["rollout-0"].set.remote(fail_in="update_weights"))
    report = sync.publish(Version(0, 1))
    assert not report.announced
    assert report.failed == {}
    assert "update_weights was made to fail" in str(report.error)
    assert states(engines) == [("start", 0.0, False)] * 2
    ray.get(engines["rollout-0"].set.remote())
    assert sync.publish(Version(0, 2)).announced
    assert states(engines) == [("0.2", 2.0, False)] * 2


def test_a_lost_learner_is_said_so(ring: Any) -> None:
    sync, learner, engines = ring
    sync.open()
    ray.kill(learner)
    with pytest.raises(LearnerLost):
        sync.publish(Version(0, 1))
    assert states(engines) == [("start", 0.0, False)] * 2
