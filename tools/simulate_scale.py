"""From 8 to 1,024 GPUs: how much of a cluster works, what holds it up, and which change buys what.

    python tools/simulate_scale.py validate     the simulation against the real ring with stages that wait
    python tools/simulate_scale.py sweep        docs/scale/sweep.csv, sweep.svg and a table

The simulation is tools/scale_model.py (simpy). `sweep` takes its times from LOADS: Qwen2.5-VL-3B on H200s,
groups of 8 captions; docs/scale/README.md says which of them were measured.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scale_model import Broadcast, Design, Loads, Outcome, Simulation

OUT = Path(__file__).resolve().parent.parent / "docs" / "scale"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = 128  # groups, of the released recipe
GOAL = 0.9
PINNED = 0.3  # seconds of a snapshot at 25 GB/s

LOADS = Loads(
    group=7.4,
    group_sigma=0.3,
    lanes=16,
    judge=1.55,
    judge_sigma=0.2,
    judge_lanes=16,
    train=0.42,
    train_sigma=0.05,
    snapshot=1.2,
    weights=0.15,
    all_reduce=0.15,
    message=0.0024,
    engine_sigma=0.03,
    mtbf=1000 * 3600.0,
    restart=90.0,
)
"""Seconds; see docs/scale/README.md."""


def split(gpus: int, loads: Loads) -> tuple[int, int, int]:
    """Engines, judges and ranks in proportion to their work, at least one of each."""
    work = (loads.group / loads.lanes, loads.judge / loads.judge_lanes, loads.train)
    judges = max(1, round(gpus * work[1] / sum(work)))
    ranks = max(1, round(gpus * work[2] / sum(work)))
    return gpus - judges - ranks, judges, ranks


def designs(gpus: int) -> Iterator[tuple[str, Loads, Design]]:
    """Each with one change more than the one before."""
    engines, judges, ranks = split(gpus, LOADS)
    design = Design(engines, judges, ranks, BATCH, broadcast=Broadcast.flat, in_flight=False)
    yield "batch of 128 groups, drained engines, flat broadcast", LOADS, design
    design = replace(design, in_flight=True)
    yield "weights in flight", LOADS, design
    design = replace(design, batch=max(BATCH, engines * LOADS.lanes))
    yield "batch as large as what engines work on", LOADS, design
    design = replace(design, broadcast=Broadcast.pipelined)
    yield "pipelined broadcast", LOADS, design
    design = replace(design, queues=max(1, gpus // 64))
    yield "a queue process per 64 GPUs", LOADS, design
    loads = replace(LOADS, snapshot=PINNED)
    yield "snapshot through pinned memory", loads, design
    yield "max_staleness 4", loads, replace(design, max_staleness=4)


def simulate(loads: Loads, design: Design, seeds: int, batches: int = 16, leave_out: int = 6) -> Outcome:
    """Means over the seeds."""
    every = [Simulation(loads, design, seed).run(batches, leave_out) for seed in range(seeds)]

    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in every) / len(every)

    idle = {role: sum(one.idle[role] for one in every) / len(every) for role in every[0].idle}
    names = ("groups_per_s", "efficiency", "staleness", "wasted", "sync_s")
    return Outcome(idle=idle, **{name: mean(name) for name in names})


# ---------------------------------------------------------------- sweep


def sweep(args: Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for gpus in SIZES:
        for name, loads, design in designs(gpus):
            found = simulate(loads, design, args.seeds)
            told = {**asdict(found), **{f"idle_{role}": share for role, share in found.idle.items()}}
            del told["idle"]
            rows.append({"gpus": gpus, "design": name, "batch": design.batch, **told})
            print(f"{gpus:5d} GPUs, {name}: {found.efficiency:.1%}", flush=True)
    for name, loads in stresses().items():
        *_, (_, _, design) = designs(SIZES[-1])
        found = simulate(loads, design, args.seeds)
        told = {**asdict(found), **{f"idle_{role}": share for role, share in found.idle.items()}}
        del told["idle"]
        rows.append({"gpus": SIZES[-1], "design": f"max_staleness 4; {name}", "batch": design.batch, **told})
        print(f"{SIZES[-1]:5d} GPUs, {name}: {found.efficiency:.1%}", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "sweep.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            for row in rows
        )
    plot(rows, OUT / "sweep.svg")
    show(rows)


def stresses() -> Mapping[str, Loads]:
    """What makes it harder."""
    best = replace(LOADS, snapshot=PINNED)
    return {
        "captions vary more (sigma 0.6)": replace(best, group_sigma=0.6),
        "GPUs vary more (sigma 0.1)": replace(best, engine_sigma=0.1),
        "an engine dies once a day": replace(best, mtbf=24 * 3600.0),
        "a link of 6 GB/s": replace(best, weights=1.25, all_reduce=1.25),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Share of the GPU-seconds that is useful work")
    names = list(dict.fromkeys(row["design"] for row in rows))
    table.add_column("design")
    for gpus in SIZES:
        table.add_column(str(gpus), justify="right")
    by = {(row["design"], row["gpus"]): row["efficiency"] for row in rows}
    for name in names:
        table.add_row(name, *(f"{by[name, gpus]:.0%}" if (name, gpus) in by else "" for gpus in SIZES))
    Console().print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["design"] for row in rows if row["gpus"] == SIZES[0]):
        chosen = [row for row in rows if row["design"] == name]
        axes.plot(
            [row["gpus"] for row in chosen], [row["efficiency"] for row in chosen], marker="o", label=name
        )
    axes.axhline(GOAL, color="#999", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("useful share of the GPU-seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with path.open("w", encoding="utf-8") as out:
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})


# ---------------------------------------------------------------- validation


def validate(args: Namespace) -> None:
    """Seconds of a step, of the real ring with waiting stages and of the simulation with the same times."""
    from bench_pressure import run
    from emulated_ring import Times

    from caprl_async import conf
    from caprl_async.ring import cluster

    times = Times(rollout=1.0, judge=0.5, train=0.8, snapshot=0.05, publish=0.05)
    table = Table(title="Seconds of a step: the ring with stages that wait, and the simulation")
    for column in ("max_staleness", "ring", "simulation", "error"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect(conf.load(["conf=conf/demo.yaml"]).ring, log_level="WARNING")
        try:
            for lag in (1, 2, 4):
                asked = Namespace(groups=16, max_staleness=lag, tokens=300, steps=args.steps, leave_out=5)
                ring = run(times, asked, Path(folder) / str(lag))["step_s"]
                simulated = 16 / simulate(alike(times, 16), one_of_each(16, lag), 5).groups_per_s
                error = f"{simulated / ring - 1:+.1%}"
                table.add_row(str(lag), f"{ring:.3f}", f"{simulated:.3f}", error)
        finally:
            cluster.disconnect()
    Console().print(table)


def alike(times: Any, batch: int) -> Loads:
    """The loads of a ring of waiting stages: each stage's seconds of a batch, shared by its lanes."""
    return Loads(
        group=times.rollout * times.lanes / batch,
        lanes=times.lanes,
        group_sigma=times.jitter,
        judge=times.judge * times.lanes / batch,
        judge_lanes=times.lanes,
        judge_sigma=times.jitter,
        train=times.train / batch,
        train_sigma=times.step_jitter,
        snapshot=times.snapshot,
        weights=times.publish / (1 + 1 / 256),
        message=LOADS.message,
    )


def one_of_each(batch: int, max_staleness: int) -> Design:
    return Design(1, 1, 1, batch, max_staleness)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["validate", "sweep"])
    parser.add_argument("--seeds", type=int, default=2, help="sweep: simulations of each design")
    parser.add_argument("--steps", type=int, default=24, help="validate: steps of the real ring")
    args = parser.parse_args()
    {"validate": validate, "sweep": sweep}[args.what](args)


if __name__ == "__main__":
    main()
