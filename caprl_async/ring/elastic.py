"""Rollouts and judges that join and leave a ring while it turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from caprl_async.config import Config
from caprl_async.ring.actors import ActorSpec
from caprl_async.ring.crew import Crew
from caprl_async.ring.errors import RingFailed
from caprl_async.ring.extras import Extras

_LEAVE_S = 5.0


class Elastic(Crew):
    """A crew with room for more: `rollout.max_actors`, `judge.max_actors`, or `scale`.

    One that joins gets the learner's newest weights before it captions anything. One that leaves gives its
    work back at once. Neither stops the others.
    """

    def __init__(self, config: Config, say: Callable[[str], None], first_bundle: int) -> None:
        super().__init__(config, say, first_bundle)
        self._extras = Extras(config)
        self._given_up: dict[str, str] = {}  # who is to leave, and why

    def scale(self, *, rollouts: int | None = None, judges: int | None = None) -> None:
        """From now on so many of each; None: as before. They come as the cluster has room for them.

        Raises:
            ValueError: fewer than the ring has started with.
        """
        if rollouts is not None:
            self._extras.want("rollout", rollouts)
        if judges is not None:
            self._extras.want("judge", judges)

    def stop(self) -> None:
        super().stop()
        for name in [spec.name for spec in self._roster.all if spec.name in self._extras]:
            self._roster = self._roster.minus(name)
        if ray.is_initialized():
            self._extras.close()
        self._given_up.clear()

    def _tick(self) -> None:
        super()._tick()
        # Within a trial of Tune the places are the trial's; without a learner nobody can be given weights.
        if self._watch is None or not self._owns_group or self.weights.abandoned:
            return
        for name, reason in list(self._given_up.items()):
            del self._given_up[name]
            if name in self._extras:
                self._say(f"{reason}; going on without {name}")
                self._leave(name, for_good=True)
        for spec, group in self._extras.placed(time.monotonic()):
            self._join(spec, group)
        for name in self._extras.unwanted():
            self._leave(name)

    def _join(self, spec: ActorSpec, group: object) -> None:
        assert self._watch is not None
        self._say(f"there is room for {spec.name}; starting it")
        self._lives += 1
        call = self._start_engine(spec, group)
        self._starting[spec.name] = call, time.monotonic() + self.config.ring.start_timeout_s
        self._roster = self._roster.plus(spec)
        self._watch.add(spec.name, self._handles[spec.name], restarts=True)

    def _leave(self, name: str, *, for_good: bool = False) -> None:
        assert self._watch is not None
        self._say(f"{name} leaves")
        self.weights.settle()
        self._watch.forget(name)
        self._starting.pop(name, None)
        self._roster = self._roster.minus(name)
        handle = self._handles.pop(name)
        ray.wait([handle.stop.remote()], timeout=_LEAVE_S)
        ray.kill(handle, no_restart=True)
        self.hub.dismiss.remote(name)
        self._extras.release(name, for_good=for_good)
        if name.startswith("rollout"):
            self.weights.open()

    def _may_try_again(self, name: str) -> bool:
        return name not in self._extras and super()._may_try_again(name)

    def _cannot_go_on(self, name: str, error: RingFailed) -> None:
        """The ring goes on without one that joined; it leaves when nothing is being sent."""
        if name not in self._extras:
            raise error
        self._given_up[name] = str(error)
