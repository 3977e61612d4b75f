"""Keeps every rollout engine on the weights that it should have, also after failures; for the supervisor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from ray.exceptions import RayError

from caprl_async.ring.errors import RingFailed
from caprl_async.types import Version
from caprl_async.weights.sync import WeightSync
from caprl_async.weights.types import LearnerLost, SyncReport, TransferFailed

_TRIES = 3


def _said(error: Exception) -> str:
    """What went wrong, without the remote traceback that Ray puts into its errors."""
    return str(getattr(error, "cause", None) or error)


class Publisher:
    """`wanted` is the version that the engines hold or are about to.

    `restart(name, reason)` is called for an engine that is not in the group, or whose weights may be half
    written, which cannot be told from whole ones: it starts afresh and then comes back by `rejoin`.
    """

    def __init__(self, sync: WeightSync, restart: Callable[[str, str], None]) -> None:
        self.wanted = Version(0, 0)
        self.metrics: dict[str, float] = {}  # of the last transfer, seconds
        self._sync = sync
        self._restart = restart
        self._pending: Future[SyncReport] | None = None

    def open(self) -> None:
        """Forms the group of all engines.

        Raises:
            RingFailed: the learner is gone.
        """
        try:
            failed = self._sync.open()
        except (LearnerLost, TransferFailed, RayError) as error:
            raise RingFailed(f"no weight group could be formed: {_said(error)}") from error
        for name, reason in failed.items():
            self._restart(name, reason)

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
        pending, self._pending = self._pending, None
        try:
            report = pending.result()
        except (LearnerLost, TransferFailed, RayError) as error:
            raise RingFailed(f"the weights of {self.wanted} could not be sent: {_said(error)}") from error
        if not self._done(report):
            self._deliver()

    def close(self) -> None:
        """Ends the background thread; call it when the actors are gone."""
        self._sync.close()

    def _deliver(self) -> None:
        for _ in range(_TRIES):
            try:
                report = self._sync.publish(self.wanted)
            except (LearnerLost, TransferFailed, RayError) as error:
                raise RingFailed(f"the weights of {self.wanted} could not be sent: {_said(error)}") from error
            if self._done(report):
                return
        raise RingFailed(f"the weights of {self.wanted} reached no engine: {report.error}")

    def _done(self, report: SyncReport) -> bool:
        """Restarts what failed; False if the transfer should be tried again."""
        self.metrics = {
            "weight_sync_s": report.seconds,
            "weight_sync_pause_s": max(report.engines.values(), default=0.0),
        }
        for name, reason in report.failed.items():
            self._restart(name, reason)
        # Engines outside the group have been restarted and get the weights when they rejoin.
        return report.announced or bool(report.failed) or not report.members
