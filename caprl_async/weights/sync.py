"""The driver's part: one group of the learner and all rollout engines, kept whole over failures.

Used by the supervisor. A publish tells the learner to send and every engine to receive, at the same time; it
may run while the learner trains, for the learner's actor has threads and sends an immutable snapshot.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from caprl_async.config import WeightsConfig
from caprl_async.types import Version
from caprl_async.weights.channel import cancel
from caprl_async.weights.types import JoinInfo, LearnerLost, OpenInfo, SyncReport, TransferFailed

ATTEMPTS = 2  # the second is for the engines that a failed one has dragged along
LEARNER = "learner"  # key of the learner's call among the engines' calls
_WITHOUT_LEARNER_S = 5.0  # for engines to answer whose sender has died


@dataclass
class _Outcome:
    """How each engine fared in one attempt."""

    done: dict[str, Any] = field(default_factory=dict)
    clean: dict[str, str] = field(default_factory=dict)  # not done, but as good as before
    failed: dict[str, str] = field(default_factory=dict)
    learner: BaseException | None = None


class WeightSync:
    """Publishes the learner's snapshots to the engines. All methods may be called from any thread."""

    def __init__(
        self,
        config: WeightsConfig,
        learner: ActorHandle,
        engines: Mapping[str, ActorHandle],
        *,
        tensor_parallel_size: int = 1,
        address: str = "127.0.0.1",
    ) -> None:
        """
        Args:
            learner: Rank 0; has `open_weight_group(**OpenInfo) -> list[dict]` (one `JoinInfo` per engine)
                and `send_weights(version=Version)`.
            engines: Rollout actors by name; have `join_weight_group(**JoinInfo)` and
                `receive_weights(version=str, **JoinInfo) -> dict` with "total" seconds.
            address: Of the learner's node, as the engines reach it.
        """
        self._config = config
        self._learner = learner
        self._engines = dict(engines)
        self._size = tensor_parallel_size
        self._address = address
        self._epoch = 0
        self._joined: dict[str, JoinInfo] = {}
        self._lock = threading.Lock()  # one group, one transfer at a time
        self._newest_lock = threading.Lock()
        self._newest: Version | None = None
        self._queued: Future[SyncReport] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")

    def open(self, engines: Mapping[str, ActorHandle] | None = None) -> dict[str, str]:
        """Forms a new group, of `engines` if given; call it when engines join, leave or were restarted.

        Returns:
            Engines that are not in the group, and why.

        Raises:
            LearnerLost: the sender is gone.
            TransferFailed: no group could be formed although no engine is to blame.
        """
        with self._lock:
            if engines is not None:
                self._engines = dict(engines)
            return self._open(list(self._engines))

    def publish(self, version: Version) -> SyncReport:
        """Sends the learner's snapshot, which must be `version`, to every engine of the group.

        Engines that fail leave the group, a new one is formed of the others, and these are sent to again.

        Raises:
            LearnerLost: the sender is gone.
        """
        with self._lock:
            return self._publish(version)

    def publish_soon(self, version: Version) -> Future[SyncReport]:
        """`publish` in the background. While one is under way only the newest version waits behind it; the
        futures of versions passed over give that one's report."""
        with self._newest_lock:
            self._newest = version
            if self._queued is None:
                self._queued = self._worker.submit(self._publish_newest)
            return self._queued

    def close(self) -> None:
        """Waits for a publish under way; those that wait are dropped."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _publish_newest(self) -> SyncReport:
        with self._newest_lock:
            version, self._queued = self._newest, None
        assert version is not None
        return self.publish(version)

    def _publish(self, version: Version) -> SyncReport:
        started = time.monotonic()
        failed: dict[str, str] = {}
        seconds: dict[str, float] = {}
        error = None
        announced = False
        for _ in range(ATTEMPTS):
            if not self._joined:
                break
            outcome = self._gather(self._start_transfer(version))
            seconds.update({name: timings["total"] for name, timings in outcome.done.items()})
            failed.update(outcome.failed)
            if outcome.learner is None and not outcome.clean and not outcome.failed:
                announced = True
                break
            error = "; ".join([*outcome.failed.values(), *outcome.clean.values()]) or str(outcome.learner)
            failed.update(self._open([*outcome.done, *outcome.clean]))
            announced = bool(self._joined) and set(self._joined) <= set(seconds)
            if not outcome.clean:
                break
        duration = time.monotonic() - started
        return SyncReport(version, duration, seconds, failed, announced, len(self._joined), error)

    def _start_transfer(self, version: Version) -> dict[str, Any]:
        calls = {
            name: self._engines[name]
            .receive_weights.options(name=f"receive_weights {version}")
            .remote(version=str(version), **asdict(info))
            for name, info in self._joined.items()
        }
        calls[LEARNER] = self._learner.send_weights.options(name=f"send_weights {version}").remote(
            version=version
        )
        return calls

    def _open(self, names: list[str]) -> dict[str, str]:
        self._joined = {}
        failed: dict[str, str] = {}
        for _ in range(1 + len(names)):
            if not names:
                break
            self._epoch += 1
            group = OpenInfo(
                self._config.backend.value,
                self._epoch,
                (self._size,) * len(names),
                self._address,
                self._config.timeout_s,
            )
            try:
                infos: list[dict[str, Any]] = ray.get(self._learner.open_weight_group.remote(**asdict(group)))
            except RayActorError as error:
                raise LearnerLost(f"the learner is gone: {error}") from error
            self._joined = {name: JoinInfo(**info) for name, info in zip(names, infos, strict=True)}
            calls = {
                name: self._engines[name].join_weight_group.remote(**asdict(info))
                for name, info in self._joined.items()
            }
            outcome = self._gather(calls)
            failed.update(outcome.failed)
            if not outcome.clean and not outcome.failed:
                return failed
            self._joined = {}
            if not outcome.failed:
                raise TransferFailed("no weight group: " + "; ".join(outcome.clean.values()))
            names = [*outcome.done, *outcome.clean]
        return failed

    def _gather(self, calls: dict[str, Any]) -> _Outcome:
        """Waits for all calls; the first failure cancels the group, so that nobody waits in vain."""
        outcome = _Outcome()
        names = {ref: name for name, ref in calls.items()}
        # Members give up by themselves, with a reason, well before this.
        deadline = time.monotonic() + 3 * self._config.timeout_s
        waiting = list(names)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for ref in waiting:
                    self._failed(outcome, names[ref], TimeoutError("no answer; it hangs"))
                break
            try:
                outcome.done[names[ready[0]]] = ray.get(ready[0])
            except Exception as error:
                self._failed(outcome, names[ready[0]], error)
                if isinstance(outcome.learner, RayActorError):  # the engines cannot be told, and would wait
                    deadline = min(deadline, time.monotonic() + _WITHOUT_LEARNER_S)
        outcome.done.pop(LEARNER, None)
        if isinstance(outcome.learner, RayActorError):
            reason = f"the learner is gone: {outcome.learner}"
            raise LearnerLost(reason, outcome.failed) from outcome.learner
        return outcome

    def _failed(self, outcome: _Outcome, name: str, error: BaseException) -> None:
        first = not (outcome.clean or outcome.failed or outcome.learner)
        reason = f"{name}: {getattr(error, 'cause', None) or error}"
        if name == LEARNER:
            outcome.learner = error
        elif isinstance(error, TransferFailed):
            outcome.clean[name] = reason
        else:
            outcome.failed[name] = reason
        if first and not isinstance(outcome.learner, RayActorError):
            self._cancel(reason)

    def _cancel(self, reason: str) -> None:
        try:
            cancel(next(iter(self._joined.values())), reason)
        except TransferFailed:
            return  # the channel went down with the learner: everybody has noticed
