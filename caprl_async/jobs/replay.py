"""Executes a recorded run's learner side again and says whether it comes to the same parameters.

What is read: the run's conf, its ledger (which steps survive, who was in each batch), `batches/` and the
checkpoints that it has kept. Nothing is written.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.conf_files import RECORDED
from caprl_async.config import Config, KLPlace
from caprl_async.data.images import image_folder
from caprl_async.learner.recount import differences, told_otherwise
from caprl_async.learner.rerun import Compared, Rerun, RerunFailed, Stepped, at_home, rerun
from caprl_async.observe.metrics import Row, read_metrics
from caprl_async.replay.events import LedgerError, is_voided
from caprl_async.replay.line import LineStep, contradictions, surviving_line
from caprl_async.replay.reading import Reading
from caprl_async.replay.samples import batch_path, recorded_batch
from caprl_async.replay.saved import read_saved
from caprl_async.ring.checkpoints import RING, problem
from caprl_async.ring.errors import RingFailed
from caprl_async.types import TrainBatch

_CONF, _LEDGER = RECORDED
_SHOWN = 8  # of what is different


def run(config: Config) -> None:
    """The last line says `equal` or `not equal`.

    Raises:
        ConfError: the run cannot be executed again; the message says what is missing or contradicts itself.
        RingFailed: a rank could not go on.
        SystemExit: with 1, if anything came out otherwise than recorded.
    """
    Replay(config, Console(soft_wrap=True, highlight=False)).whole()


@dataclass
class _Found:
    """What has been computed again."""

    groups: int = 0
    captions: int = 0
    unknown: int = 0  # groups whose questions the ledger has folded away
    counted: list[str] = field(default_factory=list)  # rewards and advantages that came out otherwise
    told: list[str] = field(default_factory=list)  # advantages of the executed trainer, likewise
    compared: list[Compared] = field(default_factory=list)
    steps: int = 0

    @property
    def equal(self) -> bool:
        return bool(self.compared) and all(c.equal for c in self.compared) and not (self.counted or self.told)


class Replay:
    """One run, again."""

    def __init__(self, config: Config, console: Console) -> None:
        """
        Raises:
            ConfError: see `run`.
        """
        self.config = config
        self.console = console
        self.folder = Path(config.run)
        self.theirs = conf.read([self.folder / _CONF])
        self.images = image_folder(self.theirs, self.folder)
        self.found = _Found()
        self.recorded: dict[float | None, Row] = {row["step"]: row for row in read_metrics(self.folder)}

    def whole(self) -> None:
        try:
            with Reading(self.folder / _LEDGER) as reading:
                line = surviving_line(reading.rows())
                kept = dict(self._kept(reading))
                steps = self._chosen(line, kept)
                self._recount(steps, reading)
        except (sqlite3.Error, LedgerError) as error:
            raise ConfError(f"{self.folder / _LEDGER} cannot be used: {error}") from error
        self._execute(steps, kept)
        self._conclude(steps)

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style))

    # ------------------------------------------------------------ what there is

    def _kept(self, reading: Reading) -> Iterator[tuple[int, Path]]:
        """(step, folder) of the checkpoints that hold parameters of the line."""
        for folder in sorted((self.folder / "checkpoints").glob("step-*")):
            ring, wrong, saved = folder / RING, problem(folder), None
            try:
                saved = read_saved(ring)
            except LedgerError as error:
                wrong = wrong or str(error)
            if wrong or saved is None:
                self._say(f"{folder.name} cannot be used: {wrong}", "bold red")
            elif saved.ledger != reading.identity:
                self._say(f"{folder.name} is another run's: not compared", "yellow")
            elif is_voided(saved.position, reading.epochs):
                self._say(f"{folder.name} belongs to steps that were rolled back: not compared", "yellow")
            else:
                yield saved.version.step, ring

    def _chosen(self, line: Sequence[LineStep], kept: dict[int, Path]) -> list[LineStep]:
        """The steps to execute, whose batches are all there.

        Raises:
            ConfError: a batch or the checkpoint to begin at is missing.
        """
        begin, where = self.config.begin, f"run={self.folder}"
        if begin and begin not in kept:
            usable = ", ".join(map(str, kept)) or "none"
            raise ConfError(f"begin={begin}: {where} keeps no checkpoint of that step; it keeps {usable}")
        steps = [step for step in line if begin < step.number <= self.config.steps]
        if not steps:
            last = line[-1].number if line else 0
            raise ConfError(f"{where} has no step between begin={begin} and steps={self.config.steps}: "
                            f"it came to step {last}")  # fmt: skip
        if steps[0].number != begin + 1:
            raise ConfError(
                f"{where}: its ledger begins at step {steps[0].number}, because it went on from the "
                "checkpoint of another run, which has what came before"
            )
        batches = self.folder / "batches"
        missing = [path.name for s in steps if not (path := batch_path(batches, s.version)).is_file()]
        if missing:
            raise ConfError(
                f"{where}: {len(missing)} of {len(steps)} batches are not in {batches}: {_some(missing)}; "
                "a run keeps them with observe.record_batches=true, from its first step on"
            )
        return steps

    # ------------------------------------------------------------ rewards and advantages

    def _recount(self, steps: Sequence[LineStep], reading: Reading) -> None:
        """Holds every batch against the ledger, and computes its rewards and advantages again.

        Raises:
            ConfError: a batch is not the one that the ledger says.
        """
        found = self.found
        for step in steps:
            batch = self._batch(step)
            asked = {group.key: reading.questions(group.ready) for group in step.groups if group.ready}
            questions = {key: known for key, known in asked.items() if known is not None}
            found.counted += differences(batch, questions, _told(step), self.theirs)
            found.groups += len(batch.groups)
            found.captions += sum(len(scored.group.captions) for scored in batch.groups)
            found.unknown += sum(scored.group.key not in questions for scored in batch.groups)
        self._say(
            f"{found.groups} groups, {found.captions} captions: rewards and advantages computed again from "
            f"their verdicts, {len(found.counted)} are different",
            "bold red" if found.counted else "",
        )
        for text in found.counted[:_SHOWN]:
            self._say(f"  {text}")
        if found.unknown:
            self._say(
                f"  the questions of {found.unknown} groups are folded away: their weights are as recorded"
            )
        kl = self.theirs.learner.kl
        if kl.coef and kl.place is KLPlace.reward:
            self._say("  advantages take the reference model (learner.kl.place=reward): see below")

    def _batch(self, step: LineStep) -> TrainBatch:
        path = batch_path(self.folder / "batches", step.version)
        try:
            batch = recorded_batch(path)
        except ValueError as error:
            raise ConfError(str(error)) from error
        wrong = contradictions(step, batch)
        if wrong:
            raise ConfError(f"{path} is not the batch of step {step.number}: {'; '.join(wrong)}")
        groups = at_home(batch, self.images).groups
        images = [picture.path for scored in groups for picture in scored.image.pictures]
        missing = [path for path in images if not Path(path).is_file()]
        if missing:
            raise ConfError(f"the images of step {step.number} are not there: {_some(missing)}")
        return batch

    # ------------------------------------------------------------ parameters

    def _execute(self, steps: Sequence[LineStep], kept: dict[int, Path]) -> None:
        theirs, learner = self.theirs, self.theirs.learner
        if not Path(theirs.policy.model).is_dir():
            raise ConfError(f"policy.model={theirs.policy.model} of the run is not there any more")
        if learner.device == "cuda":
            self._check_gpus()
        start = kept[self.config.begin] if self.config.begin else None
        batches = self.folder / "batches"
        order = Rerun(
            config=theirs,
            batches=tuple(batch_path(batches, step.version) for step in steps),
            images=self.images,
            compare={step: ring / "hf" for step, ring in kept.items()},
            start=start,
        )
        ranks = f"{learner.num_ranks} rank" + ("s" if learner.num_ranks > 1 else "")
        self._say(
            f"steps {steps[0].number} to {steps[-1].number} from {start or theirs.policy.model}, "
            f"{ranks} on {learner.device}"
        )
        by_number = {step.number: step for step in steps}
        try:
            with closing(rerun(order)) as messages:  # type: ignore[type-var]
                for message in messages:
                    if isinstance(message, Stepped):
                        self._stepped(by_number[message.step], message)
                    else:
                        self._compared(message)
        except RerunFailed as error:
            raise RingFailed(str(error)) from error

    def _check_gpus(self) -> None:
        import torch

        have, wanted = torch.cuda.device_count(), self.theirs.learner.num_ranks
        if have < wanted:
            raise ConfError(
                f"learner.num_ranks={wanted} of the run: each rank takes a GPU, and this machine has {have}"
            )

    def _stepped(self, step: LineStep, message: Stepped) -> None:
        self.found.steps += 1
        recorded = self.recorded.get(step.number, {})
        loss, before = message.metrics.get("loss"), recorded.get("loss")
        text = f"step {step.number}/{self.theirs.steps}  batch {step.version}"
        if loss is not None:
            text += f"  loss {loss:.9g}" + (f" (recorded {before:.9g})" if before is not None else "")
        text += f"  {message.metrics['train_s']:.2f} s"
        wrong = told_otherwise(self._batch(step), message.advantages, _told(step))
        self.found.told += wrong
        self._say(text, "bold red" if wrong else "")
        for one in wrong[:_SHOWN]:
            self._say(f"  {one}")
        rate, then = message.metrics["lr"], recorded.get("lr")
        if then is not None and then != rate:
            self._say(
                f"  the learning rate is {rate:.6g}, was {then:.6g}: the run has been resumed with "
                f"other keys (steps, learner.*) since, and {_CONF} holds the last ones",
                "bold red",
            )

    def _compared(self, message: Compared) -> None:
        self.found.compared.append(message)
        what = f"  parameters after step {message.step}: {message.tensors} tensors, {message.values} values, "
        if message.equal:
            self._say(f"{what}equal bit by bit to the checkpoint's", "green")
            return
        self._say(f"{what}{len(message.apart)} tensors are different", "bold red")
        for name, distance in sorted(message.apart.items(), key=lambda item: -item[1]):
            self._say(f"    {name}: at most {distance:.3g} apart")

    def _conclude(self, steps: Sequence[LineStep]) -> None:
        found = self.found
        last = f"{found.steps} steps, {len(found.compared)} checkpoints compared"
        if found.equal:
            self._say(f"equal: {last}", "bold green")
            return
        if found.compared and found.compared[-1].step != steps[-1].number:
            last += f", the last after step {found.compared[-1].step} of {steps[-1].number}"
        wrong = [f"parameters after step {c.step}" for c in found.compared if not c.equal]
        wrong += [f"{len(found.counted)} rewards or advantages"] if found.counted else []
        wrong += [f"{len(found.told)} advantages of the executed steps"] if found.told else []
        if not found.compared:
            wrong.append("no kept checkpoint lies on these steps, so there is nothing to compare with")
        self._say(f"not equal: {', '.join(wrong)}; {last}", "bold red")
        sys.exit(1)


def _told(step: LineStep) -> dict[str, tuple[float, ...]]:
    return {group.key: group.advantages for group in step.groups}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
