"""Runs the demo with several seeds and writes what came out: `python tools/demo_seeds.py --seeds 0 1 2`.

One run a seed, one after the other; a seed whose result is there already is not run again. Memory is the peak
of the summed proportional set sizes of all processes of a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
_EVERY_S = 2.0
_HEAD = ["seed", "start", "trained", "gain", "start, held-out", "trained, held-out", "gain, held-out"]
_MORE = ["tokens", "precision", "recall", "staleness", "overlap", "seconds", "GiB"]


def memory(root: psutil.Process) -> int:
    """Bytes that the process and all its descendants hold now; shared pages count once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended between the listing and the look
    return total


def run(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One demo; its `result.json` with `seed` and `memory_gib`.

    Raises:
        SystemExit: the run failed.
    """
    command = [sys.executable, "-m", "caprl_async.run", "conf=conf/demo.yaml", f"seed={seed}"]
    child = subprocess.Popen([*command, f"run_dir={folder}", *overrides])
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        peak = max(peak, memory(process))
        time.sleep(_EVERY_S)
    if child.returncode:
        raise SystemExit(f"seed {seed}: the demo ended with {child.returncode}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {**result, "seed": seed, "memory_gib": peak / GIB}


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table; accuracies, gains, precision and recall in points."""
    start, trained = result["start"], result["trained"]
    points = [
        *(100 * start["judge"], 100 * trained["judge"], 100 * (trained["judge"] - start["judge"])),
        100 * start["heldout_judge"],
        100 * trained["heldout_judge"],
        100 * (trained["heldout_judge"] - start["heldout_judge"]),
    ]
    facts = f"{100 * start['fact_precision']:.1f} -> {100 * trained['fact_precision']:.1f}"
    recall = f"{100 * start['fact_recall']:.1f} -> {100 * trained['fact_recall']:.1f}"
    return [
        str(result["seed"]),
        *(f"{value:.1f}" for value in points),
        f"{start['length']:.1f} -> {trained['length']:.1f}",
        facts,
        recall,
        f"{result['staleness_mean']:.2f}",
        f"{result['overlap']:.2f}",
        f"{result['seconds']:.0f}",
        f"{result['memory_gib']:.1f}",
    ]


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of all seeds."""
    head = [*_HEAD, *_MORE]
    lines = [head, ["---"] * len(head), *(row(result) for result in results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"), help="where the runs go")
    parser.add_argument("overrides", nargs="*", help="conf keys, key=value")
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        kept = args.folder / f"seed-{seed}.json"
        if not kept.exists():
            result = run(seed, folder, args.overrides)
            kept.write_text(json.dumps(result, indent=1) + "\n")
        results.append(json.loads(kept.read_text()))
    print(table(results))
    gains = [result["trained"]["heldout_judge"] - result["start"]["heldout_judge"] for result in results]
    print(
        json.dumps({"seeds": args.seeds, "heldout_gain_mean": statistics.fmean(gains), "least": min(gains)})
    )


if __name__ == "__main__":
    main()
