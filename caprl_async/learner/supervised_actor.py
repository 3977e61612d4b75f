"""A learner rank that reads its batches from an index of examples instead of the hub."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_async.data.index import Index, rows_of_step
from caprl_async.learner.actor import LearnerActor, StepReport
from caprl_async.learner.supervised import SupervisedTrainer, sequences_of
from caprl_async.process import doing
from caprl_async.types import Version

if TYPE_CHECKING:
    from caprl_async.data.processor import PolicyProcessor

TRAIN, VALIDATION = "train.arrow", "validation.arrow"
"""Names of the indices in `run_dir/sft`."""

_AT_ONCE = 64  # images that are validated together


class SupervisedActor(LearnerActor):
    """Collective like its parent; the newest weights are gathered only when someone is to see them."""

    _processor: PolicyProcessor
    _train: Index

    def _make_trainer(self, processor: PolicyProcessor, world: int) -> SupervisedTrainer:
        self._processor = processor
        self._train = Index(self._folder / TRAIN)
        return SupervisedTrainer(self.config, processor, self.rank, world)

    @property
    def _folder(self) -> Path:
        return Path(self.config.run_dir) / "sft"

    def _step(self, version: Version) -> StepReport:
        trainer = self._supervised()
        self._use_threads()
        started = time.time()
        with doing(f"training {version}"):
            rows = rows_of_step(version.step, self.config.sft.batch, len(self._train), self.config.seed)
            sequences = sequences_of([self._train[row] for row in rows], self._processor)
            metrics = trainer.fit(sequences, version.step)
        self._version = Version(version.epoch, version.step + 1)
        return StepReport(self._version, started, time.time(), 0.0, metrics)

    def validate(self) -> dict[str, float]:
        """Loss on the first `sft.validation_images` of the held-out examples."""
        trainer = self._supervised()
        self._use_threads()
        index = Index(self._folder / VALIDATION)
        most = self.config.sft.validation_images or len(index)
        total = tokens = 0.0
        with doing("validating"):
            for first in range(0, min(most, len(index)), _AT_ONCE):
                rows = range(first, min(first + _AT_ONCE, most, len(index)))
                found = trainer.validate(sequences_of([index[row] for row in rows], self._processor))
                total += found["validation_loss"] * found["validation_tokens"]
                tokens += found["validation_tokens"]
        return {"validation_loss": total / tokens, "validation_tokens": tokens}

    def present(self, version: Version) -> None:
        """Gathers the weights of now, to be sent to engines as `version`."""
        self._take_snapshot(version)

    def save(self, path: str) -> None:
        self._take_snapshot(self._version)
        super().save(path)

    def _supervised(self) -> SupervisedTrainer:
        trainer = self._ready()
        assert isinstance(trainer, SupervisedTrainer)
        return trainer
