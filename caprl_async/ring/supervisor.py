"""The core of the control plane: starts the ring, turns it one learner step at a time, and ends it.

Everything here is a small control message over Ray; prompts, captions, verdicts and batches travel between
the actors over ZeroMQ and never come by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import ray

from caprl_async.config import Config
from caprl_async.files import Digests
from caprl_async.judge.panel import panel
from caprl_async.learner.actor import StepReport
from caprl_async.replay.eval_spec import EvalResult, EvalSpec
from caprl_async.replay.saved import read_saved
from caprl_async.ring.checkpoints import RING, Checkpoints, step_of
from caprl_async.ring.elastic import Elastic
from caprl_async.ring.errors import LearnersLost, RingFailed, SaveFailed
from caprl_async.types import FOREIGN, Version

T = TypeVar("T")

_FIRST_WORD_S = 30.0  # a step that takes longer explains itself
_LOOK_S = 10.0  # between looks at the queue of a step that takes long


class Supervisor(Elastic):
    """One ring of actors. `start`, then `step` as often as wanted, `stop` in any case.

    Engines and the queue that die are started again beside the work. When a learner rank dies, all ranks
    start again and the ring goes back to the last checkpoint in `checkpoints`, or to the start: `version`
    then says so.
    """

    def __init__(
        self, config: Config, *, say: Callable[[str], None] = lambda _: None, first_bundle: int = 0
    ) -> None:
        """`first_bundle` is the first bundle of the current placement group that is not the driver's own."""
        super().__init__(config, say, first_bundle)
        self.checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep)
        self._restored: tuple[Path, int] | None = None  # the last cut that was asked for, and its step
        self._foreign: str | None = None  # the checkpoint whose weights the engines show instead of the run's
        self._saving: list[Any] = []  # ranks that still write
        self._next_word, self._next_look = _FIRST_WORD_S, _LOOK_S

    # ------------------------------------------------------------ the turn of the ring

    def open_admission(self) -> None:
        """Lets prompts flow; before this the engines are ready and idle."""
        self._surviving(lambda: self.ask_hub("open_admission"))

    def step(self) -> dict[str, float]:
        """Trains on one batch and starts sending the new weights; returns the step's metrics, flat.

        The weights travel while the next step waits for its batch and trains, so a step's own transfer is
        in the metrics of a later one.
        """
        return self._surviving(self._step)

    def _step(self) -> dict[str, float]:
        before = self.version
        reports: list[StepReport] = self.ask_learners(
            "train_step", before, on_wait=self._explaining(f"step {before.step + 1}")
        )
        report = reports[0]
        self.version = report.version
        self.ask_hub("trained", self.version, report.started, report.finished, report.advantages)
        self.deaths.clear()
        if self.version.step % self.config.weights.broadcast_interval == 0:
            self.weights.soon(self.version)
        queue = self.ask_hub("step_metrics", before)
        return {
            **report.metrics,
            **queue,
            **self.status().get("metrics", {}),
            **self.weights.metrics,
            **self.restarts_by_role(),
            "learner_wait_s": report.wait_s,
            "learner_step_s": report.finished - report.started,
        }

    def evaluate(self, spec: EvalSpec) -> EvalResult:
        """Captions held-out images (or takes given captions) and has every named judge ask about them.

        Without a version in the spec the policy is the learner's newest.
        """
        return self._surviving(lambda: self._evaluate(spec))

    def _evaluate(self, spec: EvalSpec) -> EvalResult:
        self.weights.settle()
        if spec.source == "policy" and spec.version is None and self.weights.wanted != self.version:
            self.weights.now(self.version)
        if spec.source == "policy" and spec.version is None:
            # An engine that was restarted holds the start's weights until it has rejoined.
            spec = msgspec.structs.replace(spec, version=self.weights.wanted)
        result = self.ask_hub("evaluate", spec, on_wait=self._explaining(f"evaluation {spec.name!r}"))
        return cast(EvalResult, result)

    def has_references(self) -> bool:
        """True if held-out rows come with reference captions, which give the ceiling of the result table."""
        return bool(self._surviving(lambda: self.ask_hub("references")))

    def show_weights_of(self, checkpoint: str | None) -> None:
        """Puts another checkpoint's weights into the engines for an evaluation; None: the run's own again."""
        self._foreign = checkpoint
        self._surviving(self._show)

    def _show(self) -> None:
        self.weights.settle()
        if self._foreign is None:
            self.get(self.learners[0].restore_snapshot.remote(), "learner-0")
        else:
            self.get(self.learners[0].load_foreign.remote(self._foreign), "learner-0")
        self.weights.now(self.version if self._foreign is None else FOREIGN)

    def finish(self) -> None:
        """No more batches: what is in flight is let go."""

        def let_go() -> None:
            self.weights.settle()
            self.ask_hub("pause_admission")
            self.ask_hub("finish")

        self._surviving(let_go)

    def status(self) -> dict[str, Any]:
        """The queue's view of the ring."""
        result: dict[str, Any] = self.ask_hub("status")
        return result

    def audit(self) -> dict[str, Any]:
        """What the ledger says of every prompt so far; see `replay.events.audit_rows`."""
        result: dict[str, Any] = self._surviving(lambda: self.ask_hub("audit"))
        return result

    # ------------------------------------------------------------ checkpoints

    def save(self, path: Path, *, wait: bool = True) -> None:
        """Takes one consistent cut between two steps: every rank's state, and the queue at the same version.

        The ranks stand still while they copy their state, and write it beside the next steps; without
        `wait`, `saved` says when that is done. `path/hf` is a checkpoint that transformers and `vllm serve`
        load as it is.

        Raises:
            SaveFailed: it was not taken; the ring goes on.
        """
        self.saved()
        path.mkdir(parents=True, exist_ok=True)
        try:
            self.ask_learners("save", str(path))
            self.ask_hub("save", str(path))
        except LearnersLost as error:
            self._go_back(error)
            raise SaveFailed(f"{path} was not written: {error}") from error
        except RingFailed as error:
            raise SaveFailed(f"{path} was not written: {error}") from error
        self._saving = [handle.saved.remote() for handle in self.learners]
        if wait:
            self.saved()

    def saved(self, *, wait: bool = True) -> Digests | None:
        """Whether what `save` began is on the disk: size and checksum of what the ranks wrote, by path below
        the checkpoint's folder. None if there is nothing or, without `wait`, if it is not yet done.

        Raises:
            SaveFailed: it could not be written.
        """
        if not self._saving:
            return None
        if not wait and ray.wait(self._saving, num_returns=len(self._saving), timeout=0)[1]:
            return None
        pending, self._saving = self._saving, []
        try:
            written = self.get_all(pending, "the learner")
        except LearnersLost as error:
            self._go_back(error)
            raise SaveFailed(f"the checkpoint was not written: {error}") from error
        except RingFailed as error:
            raise SaveFailed(f"the checkpoint was not written: {error}") from error
        return {name: digest for files in written for name, digest in files.items()}

    def restore(self, path: Path) -> None:
        """Goes back to a saved cut; a new epoch begins and every engine gets the restored weights."""
        self._surviving(lambda: self._load(path))
        self._restored = path, self.version.step

    def _load(self, path: Path | None) -> None:
        """To a cut, or, with fresh ranks, to the start."""
        step = read_saved(path).version.step if path is not None else 0
        self.version = Version(self.ask_hub("next_epoch"), step)
        if path is not None:
            self.ask_learners("load", str(path), self.version)
        else:
            self.ask_learners("begin_again", self.version)
        self.ask_hub("restore", str(path) if path is not None else None, self.version)
        self.weights.now(self.version)

    def trim(self) -> None:
        """Lets the queue drop from its ledger what no kept checkpoint needs, if that has grown too large."""
        kept = self.checkpoints.all()
        if kept:
            self._surviving(lambda: self.ask_hub("trim", str(kept[0] / RING)))

    # ------------------------------------------------------------ when a learner rank dies

    def _surviving(self, act: Callable[[], T]) -> T:
        """Does something although learners die: then they start again, and so does it."""
        while True:
            try:
                return act()
            except LearnersLost as error:
                self._go_back(error)

    def _go_back(self, error: LearnersLost) -> None:
        """Starts the learners again, however often they die meanwhile, and goes back to a checkpoint."""
        lost: LearnersLost | None = error
        while lost is not None:
            try:
                self._begin_again(lost)
                lost = None
            except LearnersLost as again:
                lost = again

    def _begin_again(self, error: LearnersLost) -> None:
        self._saving = []
        self.restart_learners(str(error))
        folder = self.checkpoints.newest_sound(self._say)
        cut = folder / RING if folder is not None else None
        restored, step = self._restored or (None, 0)
        if restored is not None and restored.is_dir() and (folder is None or step_of(folder) < step):
            cut = restored  # which may lie anywhere
        self._say(f"going back to {cut.parent if cut else 'the start: there is no checkpoint yet'}")
        self._load(cut)
        if self._foreign is not None:
            self._show()

    # ------------------------------------------------------------ patience

    def _explaining(self, what: str) -> Callable[[float], None]:
        self._next_word, self._next_look = _FIRST_WORD_S, _LOOK_S
        return functools.partial(self._explain_wait, what)

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
        training = set(panel(self.config.judge))
        held = "; nothing more is captioned" if training & set(status["judges_down"]) else ""
        self._say(
            f"{what} has taken {seconds:.0f} s so far{down}{held}; queue {status['queue']}, alive {alive}, "
            f"last errors: {errors}"
        )
