"""Finds actors that have died, forgotten their start, or hang, while the supervisor waits for something."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_PING_EVERY_S = 2.0
_AWAY_S = 10.0  # between two looks: then it was this process that stood still, not the actors


@dataclass
class _Watched:
    handle: ActorHandle
    restarts: bool  # Ray starts it again
    ping: Any = None
    asked: float = 0.0  # when the ping was sent; monotonic seconds
    node: str = ""
    pid: int = 0


class Watch:
    """Asks each actor for its health now and then.

    `revive(name)` is called for one that Ray has started again, `lost(name, reason)` for one that is dead for
    good, both in the thread that calls `look`. One that does not answer for `hang_timeout_s` is killed.
    """

    def __init__(
        self,
        hang_timeout_s: float,
        *,
        revive: Callable[[str], None],
        lost: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._revive = revive
        self._lost = lost
        self._say = say
        self._actors: dict[str, _Watched] = {}
        self._next = 0.0
        self._looked = 0.0
        self._looking = False

    def add(self, name: str, handle: ActorHandle, *, restarts: bool) -> None:
        """Watches an actor, instead of one of the same name."""
        self._actors[name] = _Watched(handle, restarts)

    def forget(self, name: str) -> None:
        """Watches it no longer."""
        self._actors.pop(name, None)

    def look(self, now: float) -> None:
        """Collects answers and asks again when it is time; never blocks. `now` in monotonic seconds."""
        if self._looking:  # reviving makes control calls of its own, which come back here
            return
        self._looking = True
        try:
            away = now - self._looked > _AWAY_S
            self._looked = now
            for name, actor in list(self._actors.items()):
                if away:
                    actor.asked = now
                if actor.ping is not None:
                    self._collect(name, actor, now)
            if now >= self._next:
                self._next = now + _PING_EVERY_S
                for actor in self._actors.values():
                    if actor.ping is None:
                        actor.ping, actor.asked = actor.handle.health.remote(), now
        finally:
            self._looking = False

    def kill(self, name: str) -> None:
        """Ends an actor's process, also one that has been stopped and hears nothing.

        One that Ray does not start again is then not watched any longer; a second time is harmless.
        """
        actor = self._actors.get(name)
        if actor is None:
            return
        if not actor.restarts:
            del self._actors[name]
        if actor.pid:  # of a successor that Ray has started already it is another
            kill_process(actor.node, actor.pid)
        if not actor.pid or not actor.restarts:
            with contextlib.suppress(RayError):
                ray.kill(actor.handle, no_restart=not actor.restarts)

    def _collect(self, name: str, actor: _Watched, now: float) -> None:
        done, _ = ray.wait([actor.ping], timeout=0)
        if not done:
            if now - actor.asked > self._hang_timeout_s:
                self._say(f"{name} gives no sign of life for {self._hang_timeout_s:g} s; it is killed")
                actor.asked = now
                self.kill(name)
                if not actor.restarts:
                    self._lost(name, "it did not answer")
            return
        ping, actor.ping = actor.ping, None
        try:
            health = ray.get(ping)
        except ActorDiedError as error:
            if not actor.restarts:
                self.kill(name)
                self._lost(name, str(error).strip().splitlines()[0])
            return
        except RayError:
            return  # dying: Ray restarts it, the next ping reaches its successor
        actor.node, actor.pid = health["node"], health["pid"]
        if not health["started"] and actor.restarts:  # a rank is started as one of its gang
            self._revive(name)


def kill_process(node: str, pid: int) -> None:
    """SIGKILL to a process of Ray's on any node; nothing if it is not there any more."""
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
        return
    place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    with contextlib.suppress(RayError):  # the whole node may be gone
        ray.get(ray.remote(_kill).options(num_cpus=0, scheduling_strategy=place).remote(pid), timeout=10.0)


def _kill(pid: int) -> None:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
    except OSError:
        return
    if b"ray::" in command:  # else the number belongs to another process by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
