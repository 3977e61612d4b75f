"""A ring for supervised training: the learner reads its own data; engines and judges only measure it."""

from __future__ import annotations

import json
from pathlib import Path

from caprl_async.learner.actor import LearnerActor, StepReport
from caprl_async.learner.supervised_actor import SupervisedActor
from caprl_async.replay.eval_spec import EvalResult, EvalSpec
from caprl_async.ring.errors import LearnersLost, RingFailed, SaveFailed
from caprl_async.ring.supervisor import Supervisor
from caprl_async.types import FOREIGN, Version

_CUT = "supervised.json"
_NONE = Version(-2, 0)  # of engines whose weights nobody has asked for yet


class SupervisedRing(Supervisor):
    """The same lives, checkpoints and evaluations; a cut holds the ranks' state and the step alone."""

    learner_class: type[LearnerActor] = SupervisedActor

    def _step(self) -> dict[str, float]:
        reports: list[StepReport] = self.ask_learners(
            "train_step", self.version, on_wait=self._explaining(f"step {self.version.step + 1}")
        )
        self.version = reports[0].version
        self.deaths.clear()
        seconds = reports[0].finished - reports[0].started
        return {**reports[0].metrics, **self.restarts_by_role(), "learner_step_s": seconds}

    def validate(self) -> dict[str, float]:
        """Loss on the held-out examples."""
        return self._surviving(lambda: dict(self.ask_learners("validate")[0]))

    def _evaluate(self, spec: EvalSpec) -> EvalResult:
        if spec.source == "policy" and spec.version is None and self.weights.wanted != self.version:
            self.ask_learners("present", self.version)
        return super()._evaluate(spec)

    def _show(self) -> None:
        if self._foreign is None:
            self.ask_learners("present", self.version)
        super()._show()

    def _rejoin(self) -> None:
        """Weights are gathered only for an evaluation: the ranks may be training now. What rank 0 holds for
        one, it gives again.
        """
        if self.weights.wanted in (self.version, FOREIGN):
            self.weights.rejoin(self.weights.wanted)
            return
        self.weights.settle()
        self.weights.wanted = _NONE
        self.weights.open()

    def finish(self) -> None:
        self._surviving(self.weights.settle)

    def save(self, path: Path, *, wait: bool = True) -> None:
        self.saved()
        path.mkdir(parents=True, exist_ok=True)
        try:
            self.ask_learners("save", str(path))
            (path / _CUT).write_text(json.dumps({"step": self.version.step}), encoding="utf-8")
        except LearnersLost as error:
            self._go_back(error)
            raise SaveFailed(f"{path} was not written: {error}") from error
        except (RingFailed, OSError) as error:
            raise SaveFailed(f"{path} was not written: {error}") from error
        self._saving = [handle.saved.remote() for handle in self.learners]
        if wait:
            self.saved()

    def _load(self, path: Path | None) -> None:
        step = json.loads((path / _CUT).read_text(encoding="utf-8"))["step"] if path is not None else 0
        self.version = Version(self.version.epoch + 1, step)
        if path is not None:
            self.ask_learners("load", str(path), self.version)
        else:
            self.ask_learners("begin_again", self.version)
        self.weights.now(self.version)
