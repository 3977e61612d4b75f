"""Back-pressure: does memory stay bounded, and throughput follow the slowest stage, when one stage lags?

Rings of waiting stages (tools/emulated_ring.py: real queue, peers, transport and processes) with every stage
alike, with judges 10 times slower, with a learner 10 times slower, and with rollouts 10 times faster. Prints
a table; the last line is one JSON object, whose `ratio` is the worst throughput as a share of what its
slowest stage allows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from bench_async import QUIET, room_for
from emulated_ring import EmulatedRing, Times
from rich.console import Console
from rich.table import Table

from caprl_async import conf
from caprl_async.ring import cluster


def cases(args: argparse.Namespace) -> dict[str, Times]:
    """name -> seconds of each stage per batch."""
    even = {"rollout": args.stage_s, "judge": args.stage_s, "train": args.stage_s}
    changed = {
        "all alike": {},
        "judges 10x slower": {"judge": 10 * args.stage_s},
        "learner 10x slower": {"train": 10 * args.stage_s},
        "rollouts 10x faster": {"rollout": args.stage_s / 10},
    }
    return {
        name: Times(**{**even, **change}, snapshot=0.0, publish=0.01, tokens=args.tokens)
        for name, change in changed.items()
    }


def run(times: Times, args: argparse.Namespace, run_dir: Path) -> dict[str, float]:
    """One ring: its throughput, the queue's greatest depths, and the memory of queue, rollout and judge."""
    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={run_dir}", *QUIET),
            *(f"replay.batch_groups={args.groups}", f"replay.max_staleness={args.max_staleness}"),
            *room_for(args.tokens),
            # As many as a stage's device works on at one time: with fewer it would idle.
            *(f"{room}.max_requests_in_flight_per_actor={args.groups}" for room in ("rollout", "judge")),
        ]
    )
    ring = EmulatedRing(config, times)
    depths: list[dict[str, int]] = []
    memory: list[float] = []
    try:
        ring.start()
        actors = {"queue": ring.hub, "rollout": ring.rollouts[0], "judge": ring.judges[0]}
        pids = [ring.get(handle.health.remote())["pid"] for handle in actors.values()]
        ring.open_admission()
        for step in range(args.steps):
            if step == args.leave_out:
                began = time.time()
            ring.step()
            depths.append(ring.status()["queue"])
            memory.append(sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20)
        seconds = (time.time() - began) / (args.steps - args.leave_out)
        ring.finish()
    finally:
        ring.stop()
    slowest = max(times.rollout + times.publish, times.judge, times.train)
    half = len(memory) // 2
    return {
        "step_s": seconds,
        "share_of_slowest": slowest / seconds,
        "outstanding_max": max(depth["outstanding"] for depth in depths),
        "waiting_judge_max": max(depth["waiting_judge"] for depth in depths),
        "ready_max": max(depth["ready"] for depth in depths),
        "memory_mb": max(memory),
        "growth_mb": max(memory[half:]) - max(memory[:half]),
    }


_SHOWN = {
    "step_s": "seconds per step",
    "share_of_slowest": "the slowest stage's seconds as a share of it",
    "outstanding_max": "most groups on their way",
    "waiting_judge_max": "most groups waiting for a judge",
    "ready_max": "most groups ready",
    "memory_mb": "most memory of queue, rollout and judge process, MB",
    "growth_mb": "of it grown in the second half, MB",
}


def show(found: dict[str, dict[str, float]]) -> None:
    table = Table("EMULATED: stages wait", *found)
    for name, text in _SHOWN.items():
        table.add_row(text, *(f"{figures[name]:.3g}" for figures in found.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage-s", type=float, default=0.4, help="seconds of each stage per batch")
    parser.add_argument("--groups", type=int, default=8, help="groups per batch")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of a caption")
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--leave-out", type=int, default=4, help="first steps that are not timed")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect(conf.load(["conf=conf/demo.yaml"]).ring, log_level="WARNING")
        try:
            for number, (name, times) in enumerate(cases(args).items()):
                found[name] = run(times, args, Path(folder) / str(number))
        finally:
            cluster.disconnect()
    show(found)
    worst = min(figures["share_of_slowest"] for figures in found.values())
    print(json.dumps({**vars(args), "cases": found, "ratio": worst}))


if __name__ == "__main__":
    main()
