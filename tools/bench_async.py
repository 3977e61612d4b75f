"""How much faster is the asynchronous ring than the synchronous one? `python tools/bench_async.py`.

Both use the same configuration and machine, one after the other in one run; they differ in
`replay.max_staleness`, which is 0 for the synchronous one. Two ways to ask:

- `--emulated`: each stage as if it had a device of its own. The ring's processes, queue, transport, peers
  and supervisor are real; rollout, judge, learner and weight transfer *wait* for the given times instead of
  computing. Compared are *phases* (max_staleness 0, the judge begins when the whole batch has been captioned:
  one stage after the other), *lag 0* (max_staleness 0 as it is: groups are judged while others are
  captioned) and *lag n* for each of `--lags`. The bound is the sum of the stage times over the slowest stage.
  `ratio` in the last line is measured, of the first of `--lags` to phases; `share_of_bound` is the slowest
  stage's time over the step's, so what phases loses beyond the sum of its stages does not count.
- without it: the demo on this machine's cores, which all stages share. The first steps are left out.
  *Overhead* is the share of the run's CPU seconds that is not in the stages' own computation, which is what
  the threads spend that step an engine or train: those with more than a fifth of the CPU time of a rollout's
  or judge's process, or more than a twentieth of a learner's, which takes turns with several. Their other
  threads (prompts, messages, sending weights), queue, driver and Ray's processes are overhead. `ratio` in the
  last line is of the synchronous to the asynchronous step time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from emulated_ring import EmulatedRing, Times, share
from rich.console import Console
from rich.table import Table

from caprl_async import conf
from caprl_async.observe.metrics import read_metrics
from caprl_async.ring import cluster

QUIET = [
    *("data.heldout=", "evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
    *("evaluate.dense_policy=", "evaluate.probe_images=0", "checkpoint.interval=100000"),
]
"""Nothing but training."""

STAGES = {"rollout": "rollout-", "judge": "judge-", "learner": "learner-"}
"""Beginnings of their processes' titles (caprl_async/process.py)."""
COMPUTES = {"rollout": 0.2, "judge": 0.2, "learner": 0.05}
"""Share of its process's CPU time above which a stage's thread is taken to compute."""
OVERHEAD = (*(f"around {stage}" for stage in STAGES), "queue", "driver", "ray")
_POLL_S = 0.05


def room_for(tokens: int) -> tuple[str, str]:
    """Keys that let captions be so long; the queue takes none that is longer."""
    return f"rollout.max_tokens={tokens}", f"rollout.engine.max_model_len={tokens + 256}"


# ---------------------------------------------------------------- stages that wait


def bound(times: Times) -> tuple[float, float]:
    """Seconds per step of the stages one after the other, and of the slowest alone."""
    learner = times.train + times.snapshot
    whole = times.rollout + times.judge + learner + times.publish
    return whole, max(times.rollout + times.publish, times.judge, learner)


def emulate(lag: int, times: Times, args: argparse.Namespace, run_dir: Path) -> dict[str, float]:
    """One ring of waiting stages; its figures over the steps after the first ones."""
    held = max(args.in_flight, args.groups) if times.phases else args.in_flight
    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={run_dir}", *QUIET),
            *(f"replay.max_staleness={lag}", f"replay.batch_groups={args.groups}"),
            f"rollout.max_requests_in_flight_per_actor={args.in_flight}",
            f"judge.max_requests_in_flight_per_actor={held}",
            *room_for(args.tokens),
        ]
    )
    ring = EmulatedRing(config, times)
    ends, rows = [], []
    try:
        ring.start()
        ring.open_admission()
        for _ in range(args.steps):
            rows.append(ring.step())
            ends.append(time.time())
        logs = ring.logs()
        ring.finish()
    finally:
        ring.stop()
    begin, end, rows = ends[args.leave_out - 1], ends[-1], rows[args.leave_out :]
    idle: dict[str, float] = {}
    for stage, (spans, stops) in logs.items():
        lanes = 1 if stage == "learner" else times.lanes
        idle[f"idle_{stage}"] = 1 - share(spans, begin, end) / lanes - share(stops, begin, end)
    return {
        "step_s": (end - begin) / len(rows),
        **idle,
        "stopped_rollout": share(logs["rollout"][1], begin, end),
        "staleness": statistics.fmean(row["staleness_mean"] for row in rows),
        "again": sum(row["stale_retries"] for row in rows) / (args.groups * len(rows)),
    }


_EMULATED = {
    "step_s": "seconds per step",
    "idle_rollout": "idle share of the rollout's device",
    "stopped_rollout": "and stopped for new weights",
    "idle_judge": "idle share of the judge's device",
    "idle_learner": "idle share of the learner's device",
    "staleness": "mean staleness of the tokens",
    "again": "groups captioned again, too old, per group trained",
}


def run_emulated(args: argparse.Namespace) -> dict[str, Any]:
    """All rings, one after the other; prints the table."""
    times = Times(
        rollout=args.rollout_s,
        judge=args.judge_s,
        train=args.train_s,
        snapshot=args.snapshot_s,
        publish=args.publish_s,
        lanes=args.lanes,
        jitter=args.jitter,
        step_jitter=args.step_jitter,
        tokens=args.tokens,
    )
    phases = Times(**{**vars(times), "phases": True})
    ways = {"phases": (0, phases), "lag 0": (0, times), **{f"lag {lag}": (lag, times) for lag in args.lags}}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect(conf.load(["conf=conf/demo.yaml"]).ring, log_level="WARNING")
        try:
            for number, (way, (lag, waits)) in enumerate(ways.items()):
                found[way] = emulate(lag, waits, args, Path(folder) / str(number))
        finally:
            cluster.disconnect()
    title = (
        f"EMULATED: stages wait, seconds per batch of {args.groups} groups: rollout {times.rollout:g}, "
        f"judge {times.judge:g}, learner {times.train:g} + {times.snapshot:g}, transfer {times.publish:g}"
    )
    show(title, _EMULATED, found)
    whole, slowest = bound(times)
    best = found[f"lag {args.lags[0]}"]["step_s"]
    shares = {way: slowest / one["step_s"] for way, one in found.items() if way.startswith("lag ")}
    print(
        f"stages one after the other {whole:.3g} s, the slowest {slowest:.3g} s: bound {whole / slowest:.3g}"
    )
    return {
        **vars(args),
        "ways": found,
        "bound": whole / slowest,
        "reached": whole / best,
        "share_of_bound": slowest / best,
        "share_of_bound_by_lag": shares,
        "ratio": found["phases"]["step_s"] / best,
        "ratio_lag0": found["lag 0"]["step_s"] / best,
    }


# ---------------------------------------------------------------- the demo on this machine


@dataclass(frozen=True)
class Used:
    """CPU seconds of one process so far, and of each of its threads."""

    name: str
    total: float
    threads: dict[int, float]


def processes(pid: int) -> dict[int, Used]:
    """A process and all below it."""
    found = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            cpu = process.cpu_times()
            threads = {t.id: t.user_time + t.system_time for t in process.threads()}
            found[process.pid] = Used(" ".join(process.cmdline()), cpu.user + cpu.system, threads)
        except psutil.Error:
            continue  # it has ended
    return found


def split(before: dict[int, Used], after: dict[int, Used]) -> dict[str, float]:
    """CPU seconds between two looks: of each stage's computation, and of each kind of overhead."""
    parts = dict.fromkeys([*STAGES, *OVERHEAD], 0.0)
    for pid, now in after.items():
        then = before.get(pid, Used(now.name, 0.0, {}))
        total = now.total - then.total
        stage = next((s for s, name in STAGES.items() if now.name.startswith(f"ray::{name}")), None)
        if stage is not None:
            threads = [seconds - then.threads.get(tid, 0.0) for tid, seconds in now.threads.items()]
            computed = sum(seconds for seconds in threads if seconds > COMPUTES[stage] * total)
            parts[stage] += computed
            parts[f"around {stage}"] += max(0.0, total - computed)
        elif now.name.startswith("ray::replay-queue"):
            parts["queue"] += total
        else:
            parts["driver" if "caprl_async.run" in now.name else "ray"] += total
    return parts


def overhead(parts: dict[str, float]) -> float:
    """Share that is not a stage's computation."""
    return 1 - sum(parts[stage] for stage in STAGES) / sum(parts.values())


def run_demo(lag: int, args: argparse.Namespace, run_dir: Path) -> dict[str, float]:
    """One run of the demo; its figures from the end of step `leave_out` to that of the last but one.

    Raises:
        SystemExit: the run failed.
    """
    own = [f"steps={args.steps}", f"replay.max_staleness={lag}", f"run_dir={run_dir}"]
    command = [sys.executable, "-m", "caprl_async.run", "conf=conf/demo.yaml", *QUIET, *args.overrides, *own]
    looks = []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for rows in (args.leave_out, args.steps - 1):
            while _rows(run_dir) < rows and process.poll() is None:
                time.sleep(_POLL_S)
            looks.append((time.time(), processes(process.pid), _machine_cpu()))
        _, said = process.communicate()
    except BaseException:
        process.terminate()  # it stops its own processes
        process.wait()
        raise
    if process.returncode:
        raise SystemExit(f"the demo ended with {process.returncode}: {said[-2000:]}")
    (began, before, busy_before), (ended, after, busy_after) = looks
    parts = split(before, after)
    used, wall = sum(parts.values()), ended - began
    capacity = wall * (os.cpu_count() or 1)
    rows_in = read_metrics(run_dir)[args.leave_out - 1 : args.steps - 1]
    times = [float(row["time"] or 0.0) for row in rows_in]
    waits = [float(row["learner_wait_s"] or 0.0) for row in rows_in[1:]]
    step_s = (times[-1] - times[0]) / len(waits)
    trained = [float(row["learner_step_s"] or 0.0) for row in rows_in[1:]]
    return {
        "step_s": step_s,
        "cpu_use": used / capacity,
        "others": (busy_after - busy_before - used) / capacity,
        "overhead": overhead(parts),
        "cpu_s": used / len(waits),
        **{f"cpu_{name}": seconds / len(waits) for name, seconds in parts.items()},
        "idle_rollout": float(rows_in[-1]["idle_rollout"] or 0.0),
        "idle_judge": float(rows_in[-1]["idle_judge"] or 0.0),
        "idle_learner": 1 - statistics.fmean(trained) / step_s,
        "staleness": statistics.fmean(float(row["staleness_mean"] or 0.0) for row in rows_in[1:]),
        "tokens": statistics.fmean(float(row["caption_length_mean"] or 0.0) for row in rows_in[1:]),
    }


def _rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _machine_cpu() -> float:
    """Busy CPU seconds of the whole machine."""
    cpu = psutil.cpu_times()
    return float(sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0))


_DEMO = {
    "step_s": "seconds per step",
    "cpu_use": "CPU use: share of all cores",
    "others": "share of all cores that others used",
    "overhead": "overhead: share of the run's CPU seconds",
    "cpu_s": "CPU seconds per step",
    **{f"cpu_{stage}": f"of them {stage}'s computation" for stage in STAGES},
    **{f"cpu_{name}": f"of them {name}" for name in OVERHEAD},
    **{f"idle_{stage}": f"idle share of the {stage}" for stage in STAGES},
    "staleness": "mean staleness of the tokens",
    "tokens": "tokens per caption",
}


def run_real(args: argparse.Namespace) -> dict[str, Any]:
    """The demo both ways in turn, `rounds` times; prints the table."""
    lags = {"synchronous": 0, f"max_staleness {args.lags[0]}": args.lags[0]}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in lags}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for way, lag in lags.items():
                runs[way].append(run_demo(lag, args, Path(folder) / f"{turn}-{lag}"))
    found = {
        way: {key: statistics.fmean(one[key] for one in mine) for key in _DEMO} for way, mine in runs.items()
    }
    show(f"the demo on {os.cpu_count()} cores, {args.rounds} rounds of {args.steps} steps", _DEMO, found)
    each = {way: [one["step_s"] for one in mine] for way, mine in runs.items()}
    for way, seconds in each.items():
        print(f"{way}: seconds per step of each round {', '.join(f'{s:.3f}' for s in seconds)}")
    sync, asynchronous = found.values()
    full = sync["step_s"] / (asynchronous["cpu_s"] / (os.cpu_count() or 1))
    print(f"bound: with all cores always busy the asynchronous one would be {full:.3f} times as fast")
    return {
        **vars(args),
        "ways": found,
        "step_s_of_each_round": each,
        "overhead": asynchronous["overhead"],
        "cpu_use": asynchronous["cpu_use"],
        "bound": full,
        "ratio": sync["step_s"] / asynchronous["step_s"],
    }


# ---------------------------------------------------------------- the command


def show(title: str, names: dict[str, str], columns: dict[str, dict[str, float]]) -> None:
    """A row a figure, a column a way."""
    table = Table("", *columns, title=title, title_justify="left")
    for key, name in names.items():
        table.add_row(name, *(f"{values[key]:.3f}" if key in values else "" for values in columns.values()))
    Console(width=130).print(table)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", action="store_true", help="stages wait instead of computing")
    parser.add_argument("--smoke", action="store_true", help="few short steps, to see that it works")
    parser.add_argument("--steps", type=int, help="of each run; 24 emulated, 16 otherwise")
    parser.add_argument("--leave-out", type=int, default=5, help="first steps that do not count")
    parser.add_argument(
        "--lags", type=int, nargs="+", default=[2], help="values of replay.max_staleness; the demo: the first"
    )
    parser.add_argument("--rounds", type=int, default=2, help="demo: how often both ways take turns")
    waits = parser.add_argument_group("emulated: seconds of a batch, and its shape")
    waits.add_argument("--rollout-s", type=float, default=1.0)
    waits.add_argument("--judge-s", type=float, default=0.6)
    waits.add_argument("--train-s", type=float, default=0.8)
    waits.add_argument("--snapshot-s", type=float, default=0.05, help="the learner's copy of its weights")
    waits.add_argument(
        "--publish-s", type=float, default=0.05, help="the rollout stands still for a transfer"
    )
    waits.add_argument("--groups", type=int, default=32, help="groups of a batch")
    waits.add_argument("--lanes", type=int, default=8, help="groups that a device works on at one time")
    waits.add_argument("--in-flight", type=int, default=16, help="groups leased to a rollout or judge")
    waits.add_argument("--jitter", type=float, default=0.3, help="sigma of the log-normal times of groups")
    waits.add_argument("--step-jitter", type=float, default=0.05, help="the same of training steps")
    waits.add_argument("--tokens", type=int, default=300, help="of a caption, so of the size of messages")
    parser.add_argument("overrides", nargs="*", help="demo: conf keys, key=value")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.leave_out, args.rounds, args.lags = 5, 2, 1, args.lags[:1]
        args.rollout_s, args.judge_s, args.train_s, args.groups, args.tokens = 0.2, 0.1, 0.1, 8, 20
    args.steps = args.steps or (24 if args.emulated else 16)
    if args.leave_out < 1 or args.steps < args.leave_out + 3:
        parser.error("--leave-out must be at least 1, and --steps at least 3 more")
    if args.lags[0] < 1:
        parser.error("the first of --lags is the asynchronous one: at least 1")
    return args


def main() -> None:
    args = arguments()
    print(json.dumps(run_emulated(args) if args.emulated else run_real(args)))


if __name__ == "__main__":
    main()
