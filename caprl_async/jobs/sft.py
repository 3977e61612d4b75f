"""Supervised fine-tuning by the learner group, measured like a run of reinforcement learning."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from caprl_async import conf, conf_help
from caprl_async.config import Config
from caprl_async.data.images import image_folder
from caprl_async.data.index import IndexSpec, make_index
from caprl_async.data.rows import REJECTS
from caprl_async.data.video import FrameLimits
from caprl_async.jobs.keeping import Keeper
from caprl_async.learner.supervised_actor import TRAIN, VALIDATION
from caprl_async.observe.diary import note
from caprl_async.observe.environment import write_environment
from caprl_async.observe.gauges import Gauges
from caprl_async.observe.metrics import MetricsWriter, read_metrics
from caprl_async.observe.names import METRICS
from caprl_async.observe.progress import Progress as Steps
from caprl_async.observe.report import write_report
from caprl_async.observe.table import Row, print_table, write_result
from caprl_async.observe.trackers import Trackers
from caprl_async.replay.eval_spec import heldout_spec
from caprl_async.ring import cluster
from caprl_async.ring.checkpoints import RING
from caprl_async.ring.supervised import SupervisedRing
from caprl_async.types import FOREIGN, Version


def run(config: Config) -> None:
    """Trains; resumes if `config.resume`. Whatever happens, no process is left behind.

    Raises:
        DataError: no example can be used.
        RingFailed: an actor could not go on.
    """
    conf.check_machine(_ring_of(config))
    with conf.run_folder(config) as run_dir:
        console = Console(stderr=True)
        try:
            _run(config, run_dir, console)
        finally:
            if (run_dir / METRICS).is_file():
                write_report(run_dir)
                console.print(f"report: {run_dir / 'report.html'}", markup=False, soft_wrap=True)


def _run(config: Config, run_dir: Path, console: Console) -> None:
    began = time.time()
    write_environment(run_dir)
    make_indices(config, run_dir, console)

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, soft_wrap=True)
        note(run_dir, text)

    ring = SupervisedRing(_ring_of(config), say=say)
    try:
        cluster.connect(config.ring, log_level=config.observe.log_level)
        ring.start()
        _Tuning(config, run_dir, ring, console).whole(began)
    finally:
        ring.stop()
        cluster.disconnect()


def _ring_of(config: Config) -> Config:
    """Its queue has no training data; engines are there for what they measure."""
    data = dataclasses.replace(config.data, train="")
    if config.data.heldout:
        return dataclasses.replace(config, data=data)
    return dataclasses.replace(
        config,
        data=data,
        rollout=dataclasses.replace(config.rollout, num_actors=0, max_actors=0),
        judge=dataclasses.replace(config.judge, num_actors=0, max_actors=0),
    )


def make_indices(config: Config, run_dir: Path, console: Console) -> None:
    """Reads training and held-out examples once, into `run_dir/sft`; what is there already stays.

    Raises:
        DataError: no example of a file can be used.
    """
    from caprl_async.data.processor import PolicyProcessor

    policy, sft = config.policy, config.sft
    processor = PolicyProcessor(policy.model, policy.min_pixels, policy.max_pixels)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    for name, data in ((TRAIN, sft.data), (VALIDATION, sft.validation)):
        if not data:
            continue
        spec = IndexSpec(data, config.data.prompt, sft.max_tokens, FrameLimits.of(config))
        images, rejects = image_folder(config, run_dir), run_dir / REJECTS
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"reading {Path(data).name}", total=None)
            index = make_index(
                run_dir / "sft" / name,
                spec,
                processor,
                images,
                rejects,
                lambda rows, progress=progress, task=task: progress.update(task, completed=rows),  # type: ignore[misc]
            )
        console.print(f"{len(index)} examples in {data}", markup=False, soft_wrap=True)


class _Tuning:
    """One run, from the first evaluation to the last."""

    def __init__(self, config: Config, run_dir: Path, ring: SupervisedRing, console: Console) -> None:
        self.config = config
        self.run_dir = run_dir
        self.ring = ring
        self.console = console
        self.rows: dict[str, Row] = {}

    def whole(self, began: float) -> None:
        measured = bool(self.config.data.heldout)
        if self.config.resume and (folder := self.ring.checkpoints.newest_sound(self._alarm)) is not None:
            self.console.print(f"going on from {folder}", markup=False)
            self.ring.restore(folder / RING)
        if measured and self.ring.version.step == 0:
            self.console.print("measuring the start on held-out images")
            self.rows["start"] = self._evaluate("start")
        found = self._train() or (read_metrics(self.run_dir) or [{}])[-1]  # none: a resume at the last step
        self.ring.finish()
        if measured:
            self.console.print("measuring the result on held-out images")
            self.rows["trained"] = self._evaluate("trained")
            if "start" not in self.rows:  # this run was resumed
                self.ring.show_weights_of(self.config.policy.model)
                self.rows["start"] = self._evaluate("start", FOREIGN)
            print_table(self.rows, self.console)
        write_result(
            self.run_dir / "result.json",
            self.rows,
            seconds=time.time() - began,
            steps=self.ring.version.step,
            staleness_mean=0.0,
            **{name: found[name] for name in ("loss", "validation_loss") if name in found},
        )

    def _train(self) -> dict[str, float]:
        """The last step's metrics; empty if there was no step to make."""
        config = self.config
        gauges = Gauges(self.run_dir.resolve().name)
        names = config.observe.trackers
        trackers = Trackers(names, self.run_dir.resolve(), conf_help.flat(config), self._alarm)
        keeper = Keeper(
            self.ring,
            self.run_dir,
            config.steps,
            lambda folder: self.ring.save(folder / RING, wait=False),
            self._alarm,
        )
        metrics: dict[str, float] = {}
        with (
            MetricsWriter(self.run_dir) as writer,
            Steps(config.steps, self.console) as progress,
            closing(trackers),
        ):
            while self.ring.version.step < config.steps:
                metrics = self.ring.step()
                step = self.ring.version.step
                if config.sft.validation and (step % config.sft.interval == 0 or step == config.steps):
                    metrics |= self.ring.validate()
                if config.evaluate.interval and step % config.evaluate.interval == 0:
                    metrics |= self._evaluate(f"step-{step:06d}").flat()
                if self.ring.version.step != step:
                    continue  # the ring went back meanwhile: the step comes again
                writer.write(step, metrics)
                gauges.set(metrics)
                trackers.log(step, {name: x for name, x in metrics.items() if math.isfinite(x)})
                progress.show(step, metrics)
                keeper.after(step)
        return metrics

    def _evaluate(self, name: str, version: Version | None = None) -> Row:
        return Row.of(self.ring.evaluate(heldout_spec(self.config, name, "policy", version=version)))

    def _alarm(self, text: str) -> None:
        self.console.print(text, style="bold red", markup=False, soft_wrap=True)
