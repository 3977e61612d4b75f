"""The actors of a ring and their lives: placed, started, watched, started again, asked, ended."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError

from caprl_async.config import Config
from caprl_async.judge.panel import panel
from caprl_async.learner.actor import LearnerActor, RanksDisagree
from caprl_async.replay.hub import HubAsleep, ReplayQueue
from caprl_async.replay.transport import HubAddress, HubKeys
from caprl_async.ring import cluster
from caprl_async.ring.actors import HUB, ActorSpec, Roster, reserve, roster, spawn
from caprl_async.ring.calls import out_of_memory, wait_for
from caprl_async.ring.errors import ActorLost, LearnersLost, RingFailed, RingLost
from caprl_async.ring.publisher import Publisher
from caprl_async.ring.watch import Watch
from caprl_async.types import FOREIGN, Version
from caprl_async.weights.sync import WeightSync

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_START_TRIES = 3  # of the whole ring, when actors die while it starts
_STOP_S = 5.0
_SETTLE_S = 5.0  # a rank that is dying is seen to be dead by then


class Crew:
    """See the module; `version` is the learner's."""

    learner_class: type[LearnerActor] = LearnerActor

    def __init__(self, config: Config, say: Callable[[str], None], first_bundle: int) -> None:
        self.config = config
        self.version = Version(0, 0)
        self.deaths: Counter[str] = Counter()  # by actor, since the last learner step
        self._restarts: Counter[str] = Counter()  # by role, since the start
        self._say = say
        self._roster: Roster = roster(config, first_bundle=first_bundle)
        self._handles: dict[str, ActorHandle] = {}
        self._starting: dict[str, tuple[Any, float]] = {}  # engines that start again: call, deadline
        self._lives = 0  # how often actors have been made
        self._group: Any = None
        self._owns_group = False
        self._keys = HubKeys.make()
        self._address: HubAddress | None = None
        self._publisher: Publisher | None = None
        self._watch: Watch | None = None

    # ------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Places all actors and returns when each is ready to work.

        Raises:
            RingFailed: an actor did not come up; the message holds its error.
        """
        cluster.connect(self.config.ring, log_level=self.config.observe.log_level)
        for left in reversed(range(_START_TRIES)):
            try:
                self._start_once()
                return
            except (ActorLost, LearnersLost) as error:
                if not left:
                    raise
                self._say(f"{error}; starting all again")
                self.stop()

    def _start_once(self) -> None:
        ring = self.config.ring
        self._say("starting the replay queue")
        self._lives += 1
        self._group, self._owns_group = reserve(self._roster, ring.start_timeout_s)
        watch = Watch(ring.hang_timeout_s, revive=self._revive, lost=self._lost, say=self._say)
        run_dir = str(Path(self.config.run_dir).resolve())
        hub = self._spawn(self._roster.hub, ReplayQueue, self.config, run_dir)
        address = self._address = self.get(hub.start.remote(self._keys, self._host), HUB)
        started = self._start_engines()
        host, setups = self._start_learners(address)
        self._wait_ready({**setups, **started})
        self._publisher = Publisher(self._sync(host), self._ready_rollouts, self._restart, self._look)
        self._publisher.open()
        for spec in self._roster.all:
            watch.add(spec.name, self._handles[spec.name], restarts=spec.restarts)
        self._watch = watch

    @property
    def _host(self) -> str:
        return "127.0.0.1" if self.config.ring.address == "local" else "auto"

    def _start_engines(self) -> dict[str, Any]:
        self._say("starting vLLM engines: " + ", ".join(s.name for s in self._engine_specs()))
        return {spec.name: self._start_engine(spec, self._group) for spec in self._engine_specs()}

    def _start_engine(self, spec: ActorSpec, group: Any) -> Any:
        """The call that starts it."""
        # Imported here: these modules are the actors', and the driver of a large ring needs neither.
        from caprl_async.judge.actor import JudgeActor
        from caprl_async.rollout.actor import RolloutActor

        if spec.role == "rollout":
            handle = self._spawn(spec, RolloutActor, spec.name, self.config, self._address, group=group)
        else:
            models = panel(self.config.judge)
            serves = models[spec.index % len(models)] if spec.role == "judge" else "heldout"
            handle = self._spawn(spec, JudgeActor, spec.name, serves, self.config, self._address, group=group)
        return handle.start.remote()

    def _engine_specs(self) -> tuple[ActorSpec, ...]:
        return (*self._roster.rollouts, *self._roster.judges, *self._roster.heldout_judges)

    def _start_learners(self, address: HubAddress) -> tuple[str, dict[str, Any]]:
        """Address of rank 0's node, and every rank's call of `setup`."""
        self._say("starting DeepSpeed: " + ", ".join(s.name for s in self._roster.learners))
        ranks = [
            self._spawn(spec, self.learner_class, rank, self.config, address)
            for rank, spec in enumerate(self._roster.learners)
        ]
        host, port = self.get(ranks[0].rendezvous.remote(), self._roster.learners[0].name)
        setups = {
            spec.name: rank.setup.remote(len(ranks), host, port)
            for spec, rank in zip(self._roster.learners, ranks, strict=True)
        }
        return str(host), setups

    def _sync(self, learner_host: str) -> WeightSync:
        return WeightSync(
            self.config.weights,
            self.learners[0],
            self._named(self._roster.rollouts),
            tensor_parallel_size=self.config.rollout.engine.tensor_parallel_size,
            address=learner_host,
        )

    def _wait_ready(self, calls: dict[str, Any]) -> None:
        """Waits for the calls that start actors, and says who is ready."""
        limit = self.config.ring.start_timeout_s
        deadline = time.monotonic() + limit

        def check(_: float) -> None:
            if time.monotonic() > deadline:
                raise RingFailed(
                    f"{name} was not ready within ring.start_timeout_s={limit:g} s; "
                    "look into its log below /tmp/ray/session_latest/logs, or allow more time"
                )

        for name, call in calls.items():
            (ready,) = self.get_all([call], name, check)
            note = ready.get("note", "") if isinstance(ready, dict) else ""
            self._say(f"{name} is ready" + (f"; {note}" if note else ""))

    def stop(self) -> None:
        """Ends every actor and what else was started; safe to call twice and half-way through `start`."""
        if not ray.is_initialized():
            return
        self._watch = None
        stops: list[Any] = [handle.stop.remote() for handle in self._handles.values()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=_STOP_S)
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)
        if self._publisher is not None:
            # Its thread would otherwise call Ray after the shutdown, and so start another one.
            self._publisher.close()
            self._publisher = None
        self._handles.clear()
        self._starting.clear()
        if self._group is not None and self._owns_group:
            ray.util.remove_placement_group(self._group)
            self._group = None

    # ------------------------------------------------------------ what has died is started again

    def _died(self, name: str) -> None:
        self.deaths[name] += 1
        self._restarts[re.sub(r"-\d+$", "", name)] += 1
        most = self.config.ring.restarts
        if self.deaths[name] > most:
            error = RingFailed(
                f"{name} has died {self.deaths[name]} times without one learner step in between "
                f"(ring.restarts={most}); look into its log below /tmp/ray/session_latest/logs"
            )
            self._cannot_go_on(name, error)

    def _may_try_again(self, name: str) -> bool:
        """Whether an actor that could not be started is to be started afresh."""
        return name != HUB and self.deaths[name] < self.config.ring.restarts

    def _cannot_go_on(self, name: str, error: RingFailed) -> None:
        """An actor is not to be started again; no ring goes on without one that it began with."""
        raise error

    def restarts_by_role(self) -> dict[str, float]:
        """How often actors of each role have been started again."""
        return {f"restarts_{role.replace('-', '_')}": float(n) for role, n in self._restarts.items()}

    def _revive(self, name: str) -> None:
        """Called when Ray has started a dead actor again, which knows nothing."""
        if name in self._starting:
            return
        self._say(f"{name} died; starting it again")
        self._died(name)
        handle = self._handles[name]
        if name == HUB:
            assert self._address is not None
            port = int(self._address.endpoint.rpartition(":")[2])
            call: Any = handle.start.remote(self._keys, self._host, port, True)
        else:
            handle.hub_moved.remote(self._address)
            call = handle.start.remote()
        self._starting[name] = call, time.monotonic() + self.config.ring.start_timeout_s

    def _poll_starting(self, now: float) -> None:
        """Takes back into the ring what has come up again; does not block otherwise."""
        for name, (call, deadline) in list(self._starting.items()):
            if self.weights.abandoned and name.startswith("rollout"):
                continue  # until another learner can give it weights
            if not ray.wait([call], timeout=0)[0]:
                if now > deadline and self._watch is not None:
                    del self._starting[name]
                    self._watch.kill(name)
                continue
            del self._starting[name]
            try:
                (answer,) = wait_for([call], name, lambda _seconds, _idle: None)
            except ActorLost:
                continue  # dead again: its next sign of life leads to `_revive`
            except RingFailed as error:
                if self._watch is None or not self._may_try_again(name):
                    self._cannot_go_on(name, error)
                else:  # its predecessor's GPU memory may not have been free yet
                    self._say(f"{error}; trying again")
                    self._watch.kill(name)
                continue
            self._say(f"{name} is back")
            if name == HUB:
                self._moved(answer)
            elif name in self._named(self._roster.rollouts):
                self._rejoin()

    def _rejoin(self) -> None:
        """A rollout is back, or new: it gets the weights of now."""
        # Not what was broadcast last: the learner may hold it no more.
        self.weights.rejoin(FOREIGN if self.weights.wanted == FOREIGN else self.version)

    def _moved(self, address: HubAddress) -> None:
        """Tells everyone where the queue is now; mostly it is where it was."""
        moved = self._address is None or address.endpoint != self._address.endpoint
        self._address = address
        if moved:
            for name, handle in self._handles.items():
                if name != HUB:
                    handle.hub_moved.remote(address)

    def _ready_rollouts(self) -> dict[str, ActorHandle]:
        rollouts = self._named(self._roster.rollouts)
        return {name: handle for name, handle in rollouts.items() if name not in self._starting}

    def _restart(self, name: str, reason: str) -> None:
        """An engine has not the weights that it should have."""
        if name in self._handles and name not in self._starting:
            self._say(f"{name} has not the weights of {self.weights.wanted} ({reason}); restarting it")
            if self._watch is not None:
                self._watch.kill(name)
            else:
                ray.kill(self._handles[name], no_restart=False)

    def _lost(self, name: str, reason: str) -> None:
        raise LearnersLost(f"{name} died: {reason}")

    def restart_learners(self, reason: str) -> None:
        """Ends all ranks and starts them afresh, with the policy's first weights.

        Raises:
            LearnersLost: one died again.
            RingFailed: they do not come up.
        """
        self._say(f"{reason}; starting the learner again")
        self._died("learner-0")
        assert self._address is not None
        assert self._watch is not None
        for spec in self._roster.learners:
            self._watch.kill(spec.name)
        self.weights.abandon()
        self._lives += 1
        host, setups = self._start_learners(self._address)
        for spec in self._roster.learners:
            self._watch.add(spec.name, self._handles[spec.name], restarts=False)
        self._wait_ready(setups)
        self.weights.send_with(self._sync(host))

    # ------------------------------------------------------------ control calls

    @property
    def hub(self) -> ActorHandle:
        return self._handles[HUB]

    @property
    def learners(self) -> list[ActorHandle]:
        return list(self._named(self._roster.learners).values())

    @property
    def rollouts(self) -> list[ActorHandle]:
        return list(self._named(self._roster.rollouts).values())

    @property
    def judges(self) -> list[ActorHandle]:
        return list(self._named(self._roster.judges).values())

    @property
    def weights(self) -> Publisher:
        assert self._publisher is not None, "the ring has not been started"
        return self._publisher

    def ask_hub(self, method: str, *args: Any, on_wait: Callable[[float], None] = lambda _: None) -> Any:
        """A control call to the queue, again if it dies meanwhile: each is harmless a second time."""
        while True:
            try:
                return self.get_all([getattr(self.hub, method).remote(*args)], HUB, on_wait)[0]
            except ActorLost as error:
                if isinstance(error.__cause__, RayActorError) and error.__cause__.actor_init_failed:
                    raise RingFailed(str(error)) from error  # Ray will not try to make it again
                self._pause()
            except RingFailed as error:
                if out_of_memory(error) and self._watch is not None:
                    self._say(f"{error}; it is killed")
                    self._watch.kill(HUB)
                elif not isinstance(getattr(error.__cause__, "cause", None), HubAsleep):
                    raise
                self._pause()

    def ask_learners(
        self, method: str, *args: Any, on_wait: Callable[[float], None] = lambda _: None
    ) -> list[Any]:
        """A collective call to all ranks.

        Raises:
            LearnersLost: one of them died.
            RingFailed: the call failed.
        """
        # On the dashboard a call is its name, and the version that it works on.
        name = " ".join([method, *(str(arg) for arg in args if isinstance(arg, Version))])
        calls = [getattr(handle, method).options(name=name).remote(*args) for handle in self.learners]
        try:
            return self.get_all(calls, "the learner", on_wait)
        except (RingLost, LearnersLost):
            raise
        except RingFailed as error:
            cause = getattr(error.__cause__, "cause", None)
            afresh = isinstance(cause, RanksDisagree) or out_of_memory(error)
            if afresh or self._rank_is_dead():  # the others fail for its sake
                raise LearnersLost(str(error)) from error
            raise

    def _rank_is_dead(self) -> bool:
        for handle in self.learners:
            answered, _ = ray.wait([handle.health.remote()], timeout=_SETTLE_S)
            try:
                ray.get(answered)
            except RayActorError:
                return True
            except RayError:
                continue
        return False

    def get(self, ref: Any, name: str = "") -> Any:
        return self.get_all([ref], name)[0]

    def get_all(
        self, refs: list[Any], name: str = "", on_wait: Callable[[float], None] = lambda _: None
    ) -> list[Any]:
        """Waits for control calls while watching the actors; `on_wait(seconds)` is called now and then.

        Raises:
            RingFailed: a call failed; see `ring.errors` for its kinds.
        """

        def tick(seconds: float, idle: bool) -> None:
            if idle:
                on_wait(seconds)
            self._tick()

        try:
            return wait_for(refs, name, tick)
        except ActorLost as error:
            if name.startswith(("the learner", "learner-")):
                raise LearnersLost(str(error)) from error
            raise

    def _tick(self) -> None:
        now = time.monotonic()
        if self._publisher is not None:
            self._publisher.poll()
        if self._watch is not None:
            self._watch.look(now)
            self._poll_starting(now)

    def _look(self) -> None:
        """What a transfer's wait may do of `_tick`: nothing that transfers."""
        if self._watch is not None:
            self._watch.look(time.monotonic())

    def _pause(self) -> None:
        time.sleep(0.2)
        self._tick()

    def _named(self, specs: Sequence[ActorSpec]) -> dict[str, ActorHandle]:
        return {spec.name: self._handles[spec.name] for spec in specs}

    def _spawn(self, spec: ActorSpec, actor_class: type, *args: Any, group: Any = None) -> ActorHandle:
        handle = spawn(spec, group or self._group, actor_class, *args, life=self._lives)
        self._handles[spec.name] = handle
        return handle
