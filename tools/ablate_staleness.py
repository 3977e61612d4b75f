"""Does the correction matter, and how much staleness is worth its speed? `python tools/ablate_staleness.py`.

Trains the demo's captioner with `max_staleness` 0, 1, 2, 4 and 8, with truncated importance weights and with
none, three seeds each. One run a cell, one after the other; wall-clock is one of the axes, so the machine
should be quiet. Each finished cell is written at once, and a cell that is there is not run again; one made
with other settings is an error. The table, the plot and the cells lie in `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from caprl_async.observe.metrics import read_metrics

LAGS = (0, 1, 2, 4, 8)
CORRECTIONS = {
    "tis": ["conf=conf/presets/tis.yaml"],
    "none": ["conf=conf/presets/tis.yaml", "learner.correction.importance.level=none"],
}
BASE = ["replay.batch_groups=8", "evaluate.dense_policy=", "checkpoint.interval=1000"]
CELL_LIMIT_S = 1200.0
STOP_LIMIT_S = 120.0
OFF_POLICY = ("effective_samples_raw", "kl_behaviour", "importance_bounded")
"""Metrics of how far off policy a run was; kept as means over its steps."""
_SMOOTH = 5  # steps


@dataclass(frozen=True)
class Cell:
    lag: int
    correction: str
    seed: int

    @property
    def name(self) -> str:
        return f"lag{self.lag}-{self.correction}-seed{self.seed}"


def train(cell: Cell, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of the demo: its curve and its result.

    Raises:
        SystemExit: it failed or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        confs = [a for a in CORRECTIONS[cell.correction] if a.startswith("conf=")]
        keys = [a for a in CORRECTIONS[cell.correction] if not a.startswith("conf=")]
        own = [
            f"seed={cell.seed}",
            f"steps={steps}",
            f"replay.max_staleness={cell.lag}",
            f"run_dir={run_dir}",
        ]
        command = [sys.executable, "-m", "caprl_async.run", "conf=conf/demo.yaml", *confs, *BASE, *keys, *own]
        process = subprocess.Popen([*command, *overrides])
        try:
            code = process.wait(CELL_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the run stops its own processes
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise SystemExit(f"{cell.name} took more than {CELL_LIMIT_S:.0f} s") from None
        if code:
            raise SystemExit(f"{cell.name} ended with {code}")
        rows = read_metrics(run_dir)
        result = json.loads((run_dir / "result.json").read_text())
    began = _given(rows[0]["time"])
    curve = [
        [row["step"], round(_given(row["time"]) - began, 2), row["captions_sampled"], row["reward_all_mean"]]
        for row in rows
        if row["reward_all_mean"] is not None  # nothing was judged since the batch before
    ]
    return {
        "lag": cell.lag,
        "correction": cell.correction,
        "seed": cell.seed,
        "steps": steps,
        "overrides": list(overrides),
        "columns": ["step", "seconds since the first step", "captions sampled", "mean reward of all groups"],
        "curve": curve,
        "staleness_mean": result["staleness_mean"],
        **{name: _mean(row[name] for row in rows) for name in OFF_POLICY},
        "start": result["start"],
        "trained": result["trained"],
    }


def finished(path: Path, steps: int, overrides: Sequence[str]) -> bool:
    """Whether the cell is there.

    Raises:
        SystemExit: it was made with other settings.
    """
    if not path.exists():
        return False
    cell = json.loads(path.read_text())
    if (cell["steps"], cell["overrides"]) != (steps, list(overrides)):
        made = " ".join([f"--steps {cell['steps']}", *cell["overrides"]])
        raise SystemExit(f"{path} was made with {made}; take another --out, or remove it")
    return True


def _given(value: float | None) -> float:
    assert value is not None, "a metric that every step has"
    return value


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the steps that have the metric; NaN of none."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else math.nan


# ---------------------------------------------------------------- what it shows


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last steps."""
    return [statistics.fmean(values[max(0, i - _SMOOTH + 1) : i + 1]) for i in range(len(values))]


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown; means over the seeds, with the least and the largest where it says so."""
    head = [
        *("max_staleness", "correction", "seeds", "mean staleness"),
        *("effective samples, uncorrected", "KL from the sampling policy"),
        *("reward, last 10 steps", "held-out accuracy", "seconds per step"),
    ]
    lines = [head, ["---"] * len(head)]
    for lag, correction in itertools.product(LAGS, CORRECTIONS):
        found = [c for c in cells if (c["lag"], c["correction"]) == (lag, correction)]
        if not found:
            continue
        rewards = [statistics.fmean(point[3] for point in c["curve"][-10:]) for c in found]
        accuracy = [c["trained"]["heldout_judge"] for c in found]
        speed = [
            (last[1] - first[1]) / (last[0] - first[0]) for first, *_, last in (c["curve"] for c in found)
        ]
        lines.append(
            [
                *(str(lag), correction, str(len(found))),
                f"{statistics.fmean(c['staleness_mean'] for c in found):.2f}",
                f"{statistics.fmean(c['effective_samples_raw'] for c in found):.3f}",
                f"{statistics.fmean(c['kl_behaviour'] for c in found):.4f}",
                *(_spread(rewards, 3), _spread(accuracy, 3), _spread(speed, 2)),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward against samples and against seconds: mean and range of the seeds, dashed uncorrected."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in zip(axes, (2, 1), ("captions sampled", "seconds"), strict=True):
        for lag, correction in itertools.product(LAGS, CORRECTIONS):
            curves = [_by_step(c, column) for c in cells if (c["lag"], c["correction"]) == (lag, correction)]
            if not curves:
                continue
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            x = [statistics.fmean(curve[step][0] for curve in curves) for step in steps]
            rewards = [[curve[step][1] for curve in curves] for step in steps]
            style = {"color": f"C{LAGS.index(lag)}", "linestyle": "-" if correction == "tis" else "--"}
            name = f"max_staleness {lag}, {correction}"
            axis.plot(x, [statistics.fmean(r) for r in rewards], linewidth=1.3, label=name, **style)
            low, high = [min(r) for r in rewards], [max(r) for r in rewards]
            axis.fill_between(x, low, high, color=style["color"], alpha=0.07, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"mean reward (over {_SMOOTH} steps)")
    axes[1].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def _by_step(cell: dict[str, Any], column: int) -> dict[int, tuple[float, float]]:
    """step -> (value of the column, smoothed reward)."""
    rewards = smooth([point[3] for point in cell["curve"]])
    return {point[0]: (point[column], reward) for point, reward in zip(cell["curve"], rewards, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lags", nargs="+", type=int, default=list(LAGS), choices=LAGS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/staleness"))
    parser.add_argument("--only-show", action="store_true", help="table and plot of the cells that are there")
    parser.add_argument("overrides", nargs="*", help="conf keys, key=value")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [Cell(lag, c, seed) for seed in args.seeds for lag in args.lags for c in CORRECTIONS]
    for number, cell in enumerate(wanted, 1):
        path = args.out / f"{cell.name}.json"
        if args.only_show or finished(path, args.steps, args.overrides):
            continue
        print(f"cell {number} of {len(wanted)}: {cell.name}", flush=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(train(cell, args.steps, args.overrides)) + "\n")
        os.replace(partial, path)
    cells = [json.loads(path.read_text()) for path in sorted(args.out.glob("lag*.json"))]
    if len({(cell["steps"], *cell["overrides"]) for cell in cells}) > 1:
        raise SystemExit(f"the cells in {args.out} were made with different settings")
    if not cells:
        raise SystemExit(f"{args.out} holds no cells yet")
    text = table(cells)
    (args.out / "table.md").write_text(text + "\n")
    plot(cells, args.out / "reward.png")
    print(text)
    print(json.dumps({"cells": len(cells), "wanted": len(wanted), "out": str(args.out)}))


if __name__ == "__main__":
    main()
