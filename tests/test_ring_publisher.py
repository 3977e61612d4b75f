"""What the publisher does with each outcome of a transfer; the transfers themselves are scripted."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from caprl_async.ring.errors import LearnersLost, RingFailed
from caprl_async.ring.publisher import Publisher
from caprl_async.types import Version
from caprl_async.weights.types import LearnerLost, SyncReport

GOOD = {"announced": True}
REFUSED = {"announced": False, "error": "no memory"}
DIED = {"announced": False, "failed": {"rollout-0": "died"}, "members": 0}
NOBODY = {"announced": False, "members": 0}


class ScriptedSync:
    """Answers each publish with the next outcome of the script."""

    def __init__(self, *script: dict[str, Any] | Exception) -> None:
        self.script = list(script)
        self.published: list[Version] = []

    def open(self, engines: Any) -> dict[str, str]:
        return {}

    def publish(self, version: Version) -> SyncReport:
        self.published.append(version)
        outcome = self.script.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return SyncReport(version, 1.0, {}, **outcome)

    def publish_soon(self, version: Version) -> Future[SyncReport]:
        future: Future[SyncReport] = Future()
        try:
            future.set_result(self.publish(version))
        except LearnerLost as error:
            future.set_exception(error)
        return future


def publisher(*script: dict[str, Any] | Exception) -> tuple[Publisher, ScriptedSync, list[str]]:
    sync = ScriptedSync(*script)
    restarted: list[str] = []
    made = Publisher(sync, dict, lambda name, reason: restarted.append(name))  # type: ignore[arg-type]
    return made, sync, restarted


def test_a_refused_transfer_is_tried_again() -> None:
    weights, sync, restarted = publisher(REFUSED, GOOD)
    weights.now(Version(0, 1))
    assert sync.published == [Version(0, 1)] * 2
    assert restarted == []


def test_a_transfer_that_is_always_refused_ends_the_run_with_its_reason() -> None:
    weights, _, _ = publisher(*[REFUSED] * 9)
    with pytest.raises(RingFailed, match="no memory"):
        weights.now(Version(0, 1))


def test_a_failed_engine_is_restarted_and_gets_the_newest_weights_when_it_rejoins() -> None:
    weights, sync, restarted = publisher(DIED, NOBODY, GOOD)
    weights.soon(Version(0, 1))
    weights.soon(Version(0, 2))
    weights.settle()
    assert restarted == ["rollout-0"]
    weights.rejoin(Version(0, 2))
    assert sync.published == [Version(0, 1), Version(0, 2), Version(0, 2)]


def test_a_lost_learner_is_told_apart_and_engines_that_it_left_half_written_start_again() -> None:
    weights, _, restarted = publisher(LearnerLost("rank 0 died", {"rollout-0": "half written"}))
    weights.soon(Version(0, 1))
    with pytest.raises(LearnersLost, match="rank 0 died"):
        weights.settle()
    assert restarted == ["rollout-0"]


def test_while_a_transfer_is_waited_for_a_member_that_hangs_can_be_found() -> None:
    pending: Future[SyncReport] = Future()
    weights, sync, _ = publisher()
    sync.publish_soon = lambda version: pending  # type: ignore[method-assign]
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 2:  # its death ends the transfer
            pending.set_result(SyncReport(Version(0, 1), 1.0, {}, **DIED))

    weights._look = look
    weights.soon(Version(0, 1))
    weights.settle()
    assert looks == [0, 1]
    sync.script = [GOOD]
    weights.now(Version(0, 2))
    assert sync.published == [Version(0, 2)]


def test_a_learner_that_is_found_dead_while_a_transfer_is_waited_for_is_told_at_once() -> None:
    weights, sync, _ = publisher()
    sync.publish_soon = lambda version: Future()  # type: ignore[method-assign]

    def look() -> None:
        raise LearnersLost("learner-0 died")

    weights._look = look
    weights.soon(Version(0, 1))
    with pytest.raises(LearnersLost, match="learner-0 died"):
        weights.settle()
