"""Keeps every rollout engine on the weights that it should have, also after failures; for the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from ray.exceptions import RayError

from caprl_async.ring.errors import LearnersLost, RingFailed
from caprl_async.types import Version
from caprl_async.weights.sync import WeightSync
from caprl_async.weights.types import LearnerLost, SyncReport, TransferFailed

if TYPE_CHECKING:
    from ray.actor import ActorHandle

T = TypeVar("T")

_TRIES = 3
_LOOK_S = 1.0


def _said(error: Exception) -> str:
    """What went wrong, without the remote traceback that Ray puts into its errors."""
    return str(getattr(error, "cause", None) or error)


class Publisher:
    """`wanted` is the version that the engines hold or are about to; `members()` are its engines.

    Where the learner's sender dies, LearnersLost is raised: start the learner again, then `send_with`.

    `restart(name, reason)` is called for an engine that is not in the group, or whose weights may be half
    written, which cannot be told from whole ones: it starts afresh and then comes back by `rejoin`.

    `look()` is called every second while something is waited for, so that a member that hangs is found and
    ended; it may raise LearnersLost.
    """

    def __init__(
        self,
        sync: WeightSync,
        members: Callable[[], Mapping[str, ActorHandle]],
        restart: Callable[[str, str], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.wanted = Version(0, 0)
        self.metrics: dict[str, float] = {}  # of the last transfer, seconds
        self.abandoned = False  # nothing can be sent before `send_with`
        self._sync = sync
        self._members = members
        self._restart = restart
        self._look = look
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="weight-group")
        self._pending: Future[SyncReport] | None = None

    def open(self) -> None:
        """Forms the group of all engines.

        Raises:
            LearnersLost: the sender is gone.
            RingFailed: no group can be formed.
        """
        try:
            members = self._members()
            failed = self._beside(lambda: self._sync.open(members))
        except (LearnerLost, TransferFailed, RayError) as error:
            raise self._failure("no weight group could be formed", error) from error
        self._restart_all(failed)

    def soon(self, version: Version) -> None:
        """Sends the learner's snapshot of `version` in the background, after a transfer still under way."""
        self.settle()
        self.wanted = version
        self._pending = self._sync.publish_soon(version)

    def now(self, version: Version) -> None:
        """Sends it and waits. Engines that failed are restarted and get it when they rejoin.

        Raises:
            RingFailed: it reached no engine of the group although none is to blame, or the learner is gone.
        """
        self.settle()
        self.wanted = version
        self._deliver()

    def rejoin(self, version: Version) -> None:
        """Takes restarted engines into the group and gives all the weights of `version`."""
        self.settle()
        self.wanted = version
        self.open()
        self._deliver()

    def poll(self) -> None:
        """Deals with a background transfer that has ended; does not block otherwise."""
        if self._pending is not None and self._pending.done():
            self.settle()

    def settle(self) -> None:
        """Waits for the background transfer, if any, and deals with its failures.

        Raises:
            RingFailed: see `now`.
        """
        if self._pending is None:
            return
        self._patiently(self._pending)
        pending, self._pending = self._pending, None
        try:
            report = pending.result()
        except (LearnerLost, TransferFailed, RayError) as error:
            raise self._failure(f"the weights of {self.wanted} could not be sent", error) from error
        if not self._done(report):
            self._deliver()

    def abandon(self) -> None:
        """The learner is gone: forgets its transfers. Engines that it left half written start again."""
        self.abandoned = True
        pending, self._pending = self._pending, None
        self._aside.shutdown(wait=False)
        self._sync.close()
        if pending is not None and pending.done() and isinstance(error := pending.exception(), LearnerLost):
            self._restart_all(error.failed)

    def send_with(self, sync: WeightSync) -> None:
        """From now on another learner sends; forms its group.

        Raises:
            LearnersLost, RingFailed: see `open`.
        """
        self._sync = sync
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="weight-group")
        self.abandoned = False
        self.open()

    def close(self) -> None:
        """Ends the background threads; call it when the actors are gone."""
        self._aside.shutdown()
        self._sync.close()

    def _beside(self, act: Callable[[], T]) -> T:
        """Does it in another thread, and looks meanwhile."""
        future = self._aside.submit(act)
        self._patiently(future)
        return future.result()

    def _patiently(self, future: Future[T]) -> None:
        while not wait([future], timeout=_LOOK_S).done:
            self._look()

    def _deliver(self) -> None:
        for _ in range(_TRIES):
            try:
                report = self._beside(self._publish)
            except (LearnerLost, TransferFailed, RayError) as error:
                raise self._failure(f"the weights of {self.wanted} could not be sent", error) from error
            if self._done(report):
                return
        raise RingFailed(f"the weights of {self.wanted} reached no engine: {report.error}")

    def _publish(self) -> SyncReport:
        return self._sync.publish(self.wanted)

    def _done(self, report: SyncReport) -> bool:
        """Restarts what failed; False if the transfer should be tried again."""
        self.metrics = {
            "weight_sync_s": report.seconds,
            "weight_sync_pause_s": max(report.engines.values(), default=0.0),
        }
        self._restart_all(report.failed)
        # Engines outside the group have been restarted and get the weights when they rejoin.
        return report.announced or bool(report.failed) or not report.members

    def _restart_all(self, failed: Mapping[str, str]) -> None:
        for name, reason in failed.items():
            self._restart(name, reason)

    def _failure(self, what: str, error: Exception) -> RingFailed:
        if isinstance(error, LearnerLost):
            self._restart_all(error.failed)
            return LearnersLost(f"{what}: {_said(error)}")
        return RingFailed(f"{what}: {_said(error)}")
