"""The main job: measures the start, turns the ring for `steps` batches, measures the result, and reports.

Everything it learns on the way is in the run folder: see the README for what each file holds.
"""

from __future__ import annotations

import functools
import math
import time
from contextlib import closing
from pathlib import Path
from typing import Literal

from rich.console import Console

from caprl_async import conf, conf_help
from caprl_async.algorithm import CapRL, CapRLConfig
from caprl_async.config import Config
from caprl_async.jobs.keeping import Keeper
from caprl_async.jobs.scaling import ScaleFile
from caprl_async.observe.alarms import Alarms
from caprl_async.observe.diary import note
from caprl_async.observe.environment import write_environment
from caprl_async.observe.gauges import Gauges
from caprl_async.observe.metrics import MetricsWriter
from caprl_async.observe.names import METRICS
from caprl_async.observe.overlap import overlap_from_ledger
from caprl_async.observe.progress import Progress
from caprl_async.observe.report import write_report
from caprl_async.observe.table import Row, print_table, reference_length, write_result
from caprl_async.observe.trackers import Trackers, samples_of
from caprl_async.replay.eval_spec import heldout_spec
from caprl_async.ring import cluster
from caprl_async.ring.supervisor import Supervisor
from caprl_async.types import FOREIGN

_PICTURES = 50  # times in a run at which trackers get images


def run(config: Config) -> None:
    """Trains; resumes if `config.resume`. Whatever happens, no process is left behind.

    Raises:
        RingFailed: an actor could not go on.
    """
    conf.check_machine(config)
    with conf.run_folder(config) as run_dir:
        _run(config, run_dir, Console(stderr=True))


def _run(config: Config, run_dir: Path, console: Console) -> None:
    began = time.time()
    write_environment(run_dir)

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, soft_wrap=True)
        note(run_dir, text)

    CapRL.on_message = staticmethod(say)
    algorithm: CapRL | None = None
    try:
        cluster.connect(config.ring, log_level=config.observe.log_level, job=_about(config))
        algorithm = CapRLConfig().conf(config).build_algo()
        assert isinstance(algorithm, CapRL)
        job = _Training(config, run_dir, algorithm, console)
        job.whole(began)
    finally:
        if algorithm is not None:
            algorithm.stop()
        cluster.disconnect()
        if (run_dir / METRICS).is_file():
            write_report(run_dir)
            console.print(f"report: {run_dir / 'report.html'}", markup=False)


def _about(config: Config) -> dict[str, str]:
    """What Ray's dashboard says of the job."""
    judge = config.judge.endpoint.url or config.judge.model
    return {
        "run": Path(config.run_dir).resolve().name,
        "captioner": config.policy.model,
        "judge": judge,
        "data": config.data.train,
        "steps": str(config.steps),
    }


class _Training:
    """One run, from the first evaluation to the last."""

    def __init__(self, config: Config, run_dir: Path, algorithm: CapRL, console: Console) -> None:
        self.config = config
        self.run_dir = run_dir
        self.algorithm = algorithm
        self.ring: Supervisor = algorithm.ring
        self.console = console
        self.rows: dict[str, Row] = {}
        self._scale_file = ScaleFile(run_dir)
        algorithm.learner_group.in_background = True

    def whole(self, began: float) -> None:
        config = self.config
        if config.resume:
            self._go_on()
        measured = bool(config.data.heldout)
        if measured:
            self._measure_start()
        self._train()
        self.ring.finish()
        if measured:
            self.console.print("measuring the result on held-out images")
            self.rows["trained"] = self._evaluate("trained", "policy")
        self._write(began)  # what comes now only adds baselines
        if measured:
            self._measure_baselines()
            print_table(self.rows, self.console)
            self._write(began)

    def _write(self, began: float) -> None:
        write_result(
            self.run_dir / "result.json",
            self.rows,
            seconds=time.time() - began,
            steps=self.ring.version.step,
            staleness_mean=self.ring.status()["staleness_mean"],
            overlap=overlap_from_ledger(self.run_dir / "ledger.sqlite"),
        )

    # ------------------------------------------------------------ training

    def _go_on(self) -> None:
        folder = self.ring.checkpoints.newest_sound(lambda text: _say(self.console, text, "bold red"))
        if folder is not None:
            self.console.print(f"going on from {folder}", markup=False)
            self.algorithm.restore_from_path(str(folder))

    def _train(self) -> None:
        config = self.config
        alarms = Alarms(config.observe.bands, self.run_dir)
        gauges = Gauges(self.run_dir.resolve().name)
        write = self.algorithm.save_to_path
        keeper = Keeper(self.ring, self.run_dir, config.steps, lambda f: write(str(f)), self._alarm)
        trackers = Trackers(
            config.observe.trackers, self.run_dir.resolve(), conf_help.flat(config), self._alarm
        )
        with (
            MetricsWriter(self.run_dir) as writer,
            Progress(config.steps, self.console) as progress,
            closing(trackers),
        ):
            while self.ring.version.step < config.steps:
                self._scale()
                self.algorithm.train()
                metrics = self.algorithm.step_metrics
                step = self.ring.version.step
                if config.evaluate.interval and step % config.evaluate.interval == 0:
                    metrics |= self._evaluate(f"step-{step:06d}", "policy").flat()
                if self.ring.version.step != step:
                    continue  # the ring went back meanwhile: the step comes again
                for text in alarms.check(step, metrics):
                    self.console.print(text, style="bold red", markup=False, soft_wrap=True)
                metrics |= {"alarms": alarms.raised}
                writer.write(step, metrics)
                gauges.set(metrics)
                trackers.log(step, {name: x for name, x in metrics.items() if math.isfinite(x)})
                if step % max(1, config.steps // _PICTURES) == 0:
                    trackers.show(step, functools.partial(samples_of, self.run_dir, step - 1))
                progress.show(step, metrics)
                keeper.after(step)

    def _scale(self) -> None:
        """As the user wants it now; what cannot be done costs nothing."""
        try:
            if wanted := self._scale_file.news():
                self.ring.scale(rollouts=wanted.rollouts, judges=wanted.judges)
        except ValueError as error:
            self._alarm(f"not scaled: {error}")

    def _alarm(self, text: str) -> None:
        _say(self.console, text, "bold red")

    # ------------------------------------------------------------ evaluation

    def _measure_start(self) -> None:
        self.console.print("measuring the start on held-out images")
        if self.ring.version.step == 0:
            self.rows["start"] = self._evaluate("start", "policy")
        if self.ring.has_references():
            self.rows["ceiling"] = self._evaluate("ceiling", "reference")
        self.rows["blind"] = self._evaluate("blind", "blind")

    def _measure_baselines(self) -> None:
        self.ring.show_weights_of(self.config.policy.model)
        if "start" not in self.rows:  # this run was resumed
            self.rows["start"] = self._evaluate("start", "policy", foreign=True)
        length = min(math.ceil(self.rows["trained"].length or 0.0), self.config.rollout.max_tokens)
        self.rows["forced"] = self._evaluate("forced", "policy", min_tokens=length, foreign=True)
        if self.config.evaluate.dense_policy:
            self.ring.show_weights_of(self.config.evaluate.dense_policy)
            self.rows["dense"] = self._evaluate("dense", "policy", foreign=True)
        self.ring.show_weights_of(None)

    def _evaluate(
        self,
        name: str,
        source: Literal["policy", "reference", "blind"],
        *,
        min_tokens: int = 0,
        foreign: bool = False,
    ) -> Row:
        config = self.config
        version = FOREIGN if foreign else None
        result = self.ring.evaluate(
            heldout_spec(config, name, source, min_tokens=min_tokens, version=version)
        )
        if result["program_faults"]:
            self.console.print(
                f"evaluate.program={config.evaluate.program} failed at {result['program_faults']} of "
                f"{result['images']} captions, which precision and recall leave out: "
                f"{result['program_fault']}",
                style="bold red",
                markup=False,
            )
        length = None
        if source == "reference":
            length = reference_length(self.run_dir / "evals" / f"{name}.jsonl", config.policy.model)
        return Row.of(result, length=length)


def _say(console: Console, text: str, style: str) -> None:
    console.print(text, style=style, markup=False, soft_wrap=True)
