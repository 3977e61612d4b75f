"""Notices that Ray has restarted an actor, or that the queue has stopped, while the supervisor waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_PING_EVERY_S = 2.0


class Watch:
    """Asks each actor for its health now and then; an actor that has forgotten its start is revived.

    `revive(name)` is called in the thread that calls `look`.
    """

    def __init__(self, actors: dict[str, ActorHandle], revive: Callable[[str], None]) -> None:
        self._actors = actors
        self._revive = revive
        self._pings: dict[str, Any] = {}
        self._next = 0.0
        self._looking = False

    def look(self, now: float) -> None:
        """Collects answers and asks again when it is time; never blocks. `now` in monotonic seconds."""
        if self._looking:  # reviving makes control calls of its own, which come back here
            return
        self._looking = True
        try:
            self._collect()
            if now >= self._next:
                self._next = now + _PING_EVERY_S
                for name, handle in self._actors.items():
                    self._pings.setdefault(name, handle.health.remote())
        finally:
            self._looking = False

    def _collect(self) -> None:
        for name, ref in list(self._pings.items()):
            done, _ = ray.wait([ref], timeout=0)
            if not done:
                continue
            del self._pings[name]
            try:
                started = ray.get(ref)["started"]
            except RayError:
                continue  # dead or dying: Ray restarts it, the next ping reaches its successor
            if not started:
                self._revive(name)
