"""The core of the control plane: starts the ring, turns it one learner step at a time, and ends it.

Everything here is a small control message over Ray; prompts, captions, verdicts and batches travel between
the actors over ZeroMQ and never come by.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from caprl_async.conf import has_checkpoint
from caprl_async.config import Config
from caprl_async.learner.actor import LearnerActor, StepReport
from caprl_async.replay.eval_spec import EvalResult, EvalSpec
from caprl_async.replay.hub import ReplayQueue
from caprl_async.ring import cluster
from caprl_async.ring.actors import HUB, Roster, reserve, roster, spawn
from caprl_async.ring.errors import RingFailed
from caprl_async.ring.publisher import Publisher
from caprl_async.ring.watch import Watch
from caprl_async.types import FOREIGN, Version
from caprl_async.weights.sync import WeightSync

if TYPE_CHECKING:
    from ray.actor import ActorHandle


_CUT = "cut.json"
_FIRST_WORD_S = 30.0  # a step that takes longer explains itself
_LOOK_S = 10.0  # between looks at the queue of a step that takes long
_REVIVALS = 3  # an engine that dies so often while it starts will not come up


class Supervisor:
    """One ring of actors. `start`, then `step` as often as wanted, `stop` in any case.

    `first_bundle` is the first bundle of the current placement group that is not the driver's own.
    """

    def __init__(
        self, config: Config, *, say: Callable[[str], None] = lambda _: None, first_bundle: int = 0
    ) -> None:
        self.config = config
        self.version = Version(0, 0)
        self._say = say
        self._roster: Roster = roster(config, first_bundle=first_bundle)
        self._handles: dict[str, ActorHandle] = {}
        self._group: Any = None
        self._owns_group = False
        self._publisher: Publisher | None = None
        self._reviving = ""  # the engine that is being started again
        self._revivals: Counter[str] = Counter()  # attempts that failed, one after the other
        self._watch: Watch | None = None
        self._next_word, self._next_look = _FIRST_WORD_S, _LOOK_S

    # ------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Places all actors and returns when each is ready to work.

        Raises:
            RingFailed: an actor did not come up; the message holds its error.
        """
        ring = self.config.ring
        cluster.connect(ring, log_level=self.config.observe.log_level)
        self._say("starting the replay queue")
        self._group, self._owns_group = reserve(self._roster, ring.start_timeout_s)
        run_dir = str(Path(self.config.run_dir).resolve())
        hub = self._spawn(self._roster.hub, ReplayQueue, self.config, run_dir)
        address = self._get(
            hub.start.remote(bind_host="127.0.0.1" if ring.address == "local" else "auto"), HUB
        )
        self._start_engines(address)
        learner_host = self._start_learners(address)
        sync = WeightSync(
            self.config.weights,
            self.learners[0],
            self._named(self._roster.rollouts),
            tensor_parallel_size=self.config.rollout.engine.tensor_parallel_size,
            address=learner_host,
        )
        self._publisher = Publisher(sync, self._restart)
        self._publisher.open()
        self._watch = Watch(
            {spec.name: self._handles[spec.name] for spec in self._roster.all if spec.restarts},
            self._revive,
        )

    def _start_engines(self, address: Any) -> None:
        # Imported here: these modules are the actors', and the driver of a large ring needs neither.
        from caprl_async.judge.actor import JudgeActor
        from caprl_async.rollout.actor import RolloutActor

        self._say("starting vLLM engines: " + ", ".join(s.name for s in self._engine_specs()))
        for spec in self._roster.rollouts:
            self._spawn(spec, RolloutActor, spec.name, self.config, address)
        for spec in self._roster.judges:
            self._spawn(spec, JudgeActor, spec.name, "judge", self.config, address)
        for spec in self._roster.heldout_judges:
            self._spawn(spec, JudgeActor, spec.name, "heldout", self.config, address)
        self._started = {spec.name: self._handles[spec.name].start.remote() for spec in self._engine_specs()}

    def _engine_specs(self) -> tuple[Any, ...]:
        return (*self._roster.rollouts, *self._roster.judges, *self._roster.heldout_judges)

    def _start_learners(self, address: Any) -> str:
        """Waits for engines and ranks; returns the address of rank 0's node."""
        self._say("starting DeepSpeed: " + ", ".join(s.name for s in self._roster.learners))
        ranks = [
            self._spawn(spec, LearnerActor, rank, self.config, address)
            for rank, spec in enumerate(self._roster.learners)
        ]
        host, port = self._get(ranks[0].rendezvous.remote())
        setups = {
            spec.name: rank.setup.remote(len(ranks), host, port)
            for spec, rank in zip(self._roster.learners, ranks, strict=True)
        }
        deadline = time.monotonic() + self.config.ring.start_timeout_s
        for name, ref in {**setups, **self._started}.items():
            (ready,) = self._get_all([ref], name, lambda _, name=name: self._check_start(name, deadline))
            note = ready.get("note", "") if isinstance(ready, dict) else ""
            self._say(f"{name} is ready" + (f"; {note}" if note else ""))
        return str(host)

    def _check_start(self, name: str, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise RingFailed(
                f"{name} was not ready within ring.start_timeout_s={self.config.ring.start_timeout_s:g} s; "
                "look into its log below /tmp/ray/session_latest/logs, or allow more time"
            )

    def stop(self) -> None:
        """Ends every actor and what else was started; safe to call twice and half-way through `start`."""
        if not ray.is_initialized():
            return
        stops: list[Any] = [handle.stop.remote() for handle in self._handles.values()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=5.0)
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)
        if self._publisher is not None:
            # Its thread would otherwise call Ray after the shutdown, and so start another one.
            self._publisher.close()
        self._handles.clear()
        if self._group is not None and self._owns_group:
            ray.util.remove_placement_group(self._group)
            self._group = None

    # ------------------------------------------------------------ the turn of the ring

    def open_admission(self) -> None:
        """Lets prompts flow; before this the engines are ready and idle."""
        self._get(self.hub.open_admission.remote())

    def step(self) -> dict[str, float]:
        """Trains on one batch and starts sending the new weights; returns the step's metrics, flat.

        The weights travel while the next step waits for its batch and trains, so a step's own transfer is
        in the metrics of a later one.
        """
        before = self.version
        self._next_word, self._next_look = _FIRST_WORD_S, _LOOK_S
        explain = functools.partial(self._explain_wait, f"step {before.step + 1}")
        reports: list[StepReport] = self._get_all(
            [handle.train_step.remote(before) for handle in self.learners], on_wait=explain
        )
        report = reports[0]
        self.version = report.version
        self._get(self.hub.trained.remote(self.version, report.started, report.finished))
        if self.version.step % self.config.weights.broadcast_interval == 0:
            self._weights.soon(self.version)
        queue = self._get(self.hub.step_metrics.remote(before))
        status = self._get(self.hub.status.remote())
        return {
            **report.metrics,
            **queue,
            **status.get("metrics", {}),
            **self._weights.metrics,
            "learner_wait_s": report.wait_s,
            "learner_step_s": report.finished - report.started,
        }

    def evaluate(self, spec: EvalSpec) -> EvalResult:
        """Captions held-out images (or takes given captions) and has every named judge ask about them.

        Without a version in the spec the policy is the learner's newest.
        """
        self._weights.settle()
        if spec.source == "policy" and spec.version is None and self._weights.wanted != self.version:
            self._weights.now(self.version)
        if spec.source == "policy" and spec.version is None:
            # An engine that was restarted holds the start's weights until it has rejoined.
            spec = msgspec.structs.replace(spec, version=self._weights.wanted)
        self._next_word, self._next_look = _FIRST_WORD_S, _LOOK_S
        explain = functools.partial(self._explain_wait, f"evaluation {spec.name!r}")
        (result,) = self._get_all([self.hub.evaluate.remote(spec)], on_wait=explain)
        return cast(EvalResult, result)

    def has_references(self) -> bool:
        """True if held-out rows come with reference captions, which give the ceiling of the result table."""
        return bool(self._get(self.hub.references.remote()))

    def show_weights_of(self, checkpoint: str | None) -> None:
        """Puts another checkpoint's weights into the engines for an evaluation; None: the run's own again."""
        self._weights.settle()
        if checkpoint is None:
            self._get(self.learners[0].restore_snapshot.remote())
        else:
            self._get(self.learners[0].load_foreign.remote(checkpoint))
        self._weights.now(self.version if checkpoint is None else FOREIGN)

    def finish(self) -> None:
        """No more batches: what is in flight is let go."""
        self._weights.settle()
        self._get(self.hub.pause_admission.remote())
        self._get(self.hub.finish.remote())

    # ------------------------------------------------------------ checkpoints

    def save(self, path: Path) -> None:
        """Writes one consistent cut between two steps: every rank's state, and the queue at the same version.

        `path/hf` is a checkpoint that transformers and `vllm serve` load as it is.
        """
        path.mkdir(parents=True, exist_ok=True)
        self._get_all([handle.save.remote(str(path)) for handle in self.learners])
        state = self._get(self.hub.state.remote())
        cut = {"version": self.version, "queue": state}
        (path / _CUT).write_bytes(msgspec.json.encode(cut))

    def restore(self, path: Path) -> None:
        """Goes back to a saved cut; a new epoch begins and every engine gets the restored weights."""
        cut = msgspec.json.decode((path / _CUT).read_bytes())
        epoch, step = cut["version"]
        self.version = Version(epoch + 1, step)
        self._get_all([handle.load.remote(str(path), self.version) for handle in self.learners])
        self._get(self.hub.restore.remote(cut["queue"], self.version))
        self._weights.now(self.version)

    # ------------------------------------------------------------ control calls

    @property
    def hub(self) -> ActorHandle:
        return self._handles[self._roster.hub.name]

    @property
    def learners(self) -> list[ActorHandle]:
        return list(self._named(self._roster.learners).values())

    @property
    def rollouts(self) -> list[ActorHandle]:
        return list(self._named(self._roster.rollouts).values())

    @property
    def judges(self) -> list[ActorHandle]:
        return list(self._named(self._roster.judges).values())

    def status(self) -> dict[str, Any]:
        """The queue's view of the ring."""
        result: dict[str, Any] = self._get(self.hub.status.remote())
        return result

    def _named(self, specs: Sequence[Any]) -> dict[str, ActorHandle]:
        return {spec.name: self._handles[spec.name] for spec in specs}

    def _spawn(self, spec: Any, actor_class: type, *args: Any) -> ActorHandle:
        handle = spawn(spec, self._group, actor_class, *args)
        self._handles[spec.name] = handle
        return handle

    @property
    def _weights(self) -> Publisher:
        assert self._publisher is not None, "the ring has not been started"
        return self._publisher

    def _restart(self, name: str, reason: str) -> None:
        if name != self._reviving:  # what failed was its predecessor
            self._say(f"{name} has not the weights of {self._weights.wanted} ({reason}); restarting it")
            ray.kill(self._handles[name], no_restart=False)

    def _revive(self, name: str) -> None:
        """Called when Ray has restarted a dead engine actor: it gets its engine and the current weights."""
        self._say(f"{name} died; starting it again")
        self._reviving = name
        try:
            self._get(self._handles[name].start.remote(), name)
            self._weights.settle()
        except RingFailed as error:
            self._revivals[name] += 1
            if not isinstance(error.__cause__, RayActorError) or self._revivals[name] >= _REVIVALS:
                raise
            if isinstance(error.__cause__, ActorUnavailableError):  # it may be alive, and half started
                ray.kill(self._handles[name], no_restart=False)
            return  # it died again: Ray restarts it, and its next sign of life leads here
        finally:
            self._reviving = ""
        self._revivals[name] = 0
        if name in self._named(self._roster.rollouts):
            # Not what was broadcast last: the learner may hold it no more.
            foreign = self._weights.wanted == FOREIGN
            self._weights.rejoin(FOREIGN if foreign else self.version)

    def _get(self, ref: Any, name: str = "") -> Any:
        return self._get_all([ref], name)[0]

    def _get_all(
        self, refs: list[Any], name: str = "", on_wait: Callable[[float], None] = lambda _: None
    ) -> list[Any]:
        """Waits for control calls while watching the actors; `on_wait(seconds)` is called now and then.

        Raises:
            RingFailed: a call failed.
        """
        began = time.monotonic()
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=1.0)
            try:
                ray.get(ready)
            except RayError as error:
                raise RingFailed(self._explain(name, error)) from error
            if not ready:
                on_wait(time.monotonic() - began)
            if self._publisher is not None:
                self._publisher.poll()
            if self._watch is not None:
                self._watch.look(time.monotonic())
        return list(ray.get(refs))

    def _explain_wait(self, what: str, seconds: float) -> None:
        """Nobody should sit before a silent run: after a while says what is being waited for.

        It also finds a queue that has stopped, which would never answer the learner.
        """
        if seconds < self._next_look:
            return
        self._next_look = seconds + _LOOK_S
        status = self.status()
        if seconds < self._next_word:
            return
        self._next_word = 2 * self._next_word
        alive = {name: peer["alive"] for name, peer in status["peers"].items()}
        errors = "; ".join(f"{e['source']}: {e['error']}" for e in status["errors"][-3:]) or "none"
        down = "".join(
            f"; judges ({serves}) do not answer: {reason}" for serves, reason in status["judges_down"].items()
        )
        held = "; nothing more is captioned" if "judge" in status["judges_down"] else ""
        self._say(
            f"{what} has taken {seconds:.0f} s so far{down}{held}; queue {status['queue']}, alive {alive}, "
            f"last errors: {errors}"
        )

    def _explain(self, name: str, error: RayError) -> str:
        cause = getattr(error, "cause", None)
        # Of an actor that could not even be made, Ray gives the remote traceback; its last line is the error.
        text = f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[-1]
        resume = ""
        if has_checkpoint(Path(self.config.run_dir)):
            resume = f"; go on with: resume=true run_dir={self.config.run_dir}"
        return f"{name or 'the ring'} failed: {text}{resume}"
