"""Kills random parts of a running demo and audits what it then did: `python tools/chaos.py --kills 25`.

Every (role, phase) gets its turn: rollout, judge, queue, learner and driver, each in the middle of a
generation, a judgement, a transfer, a step and a checkpoint; by SIGKILL, SIGSTOP or the end of its memory.
What happens is appended to `OUT/kills.jsonl`: a call with more `--kills` goes on where the last one ended.
The run is ended and audited after each `--slice` kills. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chaos_ring as ring
from chaos_audit import Audit, audit
from rich.console import Console
from rich.table import Table

from caprl_async import conf

DEMO = (
    *("conf=conf/demo.yaml", "steps=1000000", "replay.batch_groups=4", "checkpoint.interval=5"),
    *("data.heldout=", "evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
    *("evaluate.dense_policy=", "evaluate.probe_images=0", "observe.record_batches=true"),
    *("ring.hang_timeout_s=15", "replay.peer_timeout_s=5", "replay.lease_timeout_s=60"),
    "learner.lr=1.0e-6",  # a captioner that has learned all has nothing left to train on
)
_PHASE_S = 30.0
_START_S = 600.0


@dataclass(frozen=True)
class Killed:
    """One line of kills.jsonl."""

    index: int
    role: str
    phase: str  # wanted
    kind: str
    seen: bool  # it was in that phase
    title: str
    time: float
    pid: int
    version: str  # newest in the ledger
    back_s: float | None
    served_s: float | None
    code: int | None = None  # the run ended with it
    said: tuple[str, ...] = ()  # its last words then


class Chaos:
    """The kills of one folder, so far."""

    def __init__(self, out: Path, overrides: Sequence[str], console: Console) -> None:
        self.out = out
        self.folder = out / "run"
        self.ledger = self.folder / "ledger.sqlite"
        self.console = console
        self._arguments = [*DEMO, f"run_dir={self.folder}", *overrides]
        self.config = conf.load(self._arguments)

    def done(self) -> list[Killed]:
        return [Killed(**line) for line in _lines(self.out / "kills.jsonl")]

    def orphans(self) -> list[str]:
        """Processes that were left behind, of all slices."""
        return [text for line in _lines(self.out / "slices.jsonl") for text in line["orphans"]]

    def slice(self, kills: Sequence[ring.Kill], patience_s: float) -> None:
        """One start of the run, or more if a kill ends it, and these kills."""
        run: ring.Run | None = self._start()
        try:
            for kill in kills:
                if run is None:
                    run = self._start()
                time.sleep(kill.pause_s)
                killed = self._one(run, kill, patience_s)
                _append(self.out / "kills.jsonl", asdict(killed))
                self._say(killed)
                if killed.served_s is None:  # the next kill must not pay for it
                    self._end(run)
                    run = None
        finally:
            if run is not None:
                self._end(run)

    def _start(self) -> ring.Run:
        """
        Raises:
            SystemExit: the run does not train.
        """
        resume = ["resume=true"] if self.ledger.is_file() else []
        run = ring.Run(self.out, [*self._arguments, *resume])
        try:
            trains = ring.await_step(run, self.ledger, _START_S)
        except BaseException:  # SIGTERM or Ctrl-C
            self._end(run)
            raise
        if not trains:
            said = "\n".join(run.said())
            self._end(run)
            raise SystemExit(f"the run does not train; its last words:\n{said}")
        self.console.print(f"the run trains after {time.time() - run.began:.0f} s", markup=False)
        return run

    def _end(self, run: ring.Run) -> None:
        code, orphans = run.code, run.end()
        line = {"time": time.time(), "code": run.code, "by_itself": code is not None, "orphans": orphans}
        _append(self.out / "slices.jsonl", line)

    def _one(self, run: ring.Run, kill: ring.Kill, patience_s: float) -> Killed:
        pid, text = ring.find_phase(run, kill, _PHASE_S)
        before = ring.mark(self.ledger)
        if pid:
            killed = ring.strike(pid, kill.kind)
            recovery = ring.await_recovery(run, self.ledger, kill, pid, before, killed, patience_s)
        else:  # it had gone by itself, which counts as a kill that was not got over
            killed, recovery = time.time(), ring.Recovery(None, None, None, run.code)
        bad = recovery.served_s is None
        return Killed(
            index=kill.index,
            role=kill.role,
            phase=kill.phase,
            kind=kill.kind,
            seen=kill.phase in ring.phases(text),
            title=text,
            time=killed,
            pid=pid,
            version=f"{before.epoch}",
            back_s=recovery.back_s,
            served_s=recovery.served_s,
            code=recovery.code,
            said=tuple(run.said()) if bad else (),
        )

    def _say(self, killed: Killed) -> None:
        where = killed.phase if killed.seen else f"not in {killed.phase}"
        how = f"{killed.served_s:.1f} s" if killed.served_s is not None else f"not back, {killed.code=}"
        self.console.print(f"{killed.index}: {killed.role}, {where}, {killed.kind}: {how}", markup=False)


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------- the report

HEAD = ("", "kills", "got over", "median s", "longest s")


def rows(done: Sequence[Killed]) -> list[tuple[str, ...]]:
    """The table: per role, per phase (of kills that met it), per kind, and of all."""
    groups = [(name, [k for k in done if k.role == name]) for name in dict.fromkeys(k.role for k in done)]
    groups += [(f"mid-{name}", [k for k in done if k.phase == name and k.seen]) for name in ring.PHASES]
    groups += [("phase not met", [k for k in done if not k.seen])]
    groups += [(name, [k for k in done if k.kind == name]) for name in ring.KINDS]
    groups += [("all", list(done))]
    return [_row(name, members) for name, members in groups if members]


def _row(name: str, members: Sequence[Killed]) -> tuple[str, ...]:
    served = [k.served_s for k in members if k.served_s is not None]
    numbers = (f"{statistics.median(served):.1f}", f"{max(served):.1f}") if served else ("-", "-")
    return (name, str(len(members)), str(len(served)), *numbers)


def totals(done: Sequence[Killed], found: Audit, orphans: Sequence[str]) -> dict[str, Any]:
    """The last line of the output."""
    served = [k.served_s for k in done if k.served_s is not None]
    return {
        "kills": len(done),
        "lost": len(found.lost),
        "doubled": len(found.doubled),
        "false_rewards": len(found.false_rewards),
        "orphans": len(orphans),
        "recovery_median_s": round(statistics.median(served), 2) if served else None,
        "recovery_max_s": round(max(served), 2) if served else None,
        "not_recovered": len(done) - len(served),
        "ended": sum(k.code is not None for k in done),
        "other": len(found.other),
        "steps": found.steps,
        "groups_checked": found.groups,
        "captions_judged_again": found.judged_again,
    }


def show(
    console: Console, done: Sequence[Killed], found: Audit, orphans: Sequence[str], markdown: bool
) -> None:
    """Tables and whatever was found."""
    table = [HEAD, *rows(done)]
    if markdown:
        for line in [table[0], ("---",) * len(HEAD), *table[1:]]:
            print("| " + " | ".join(line) + " |")
    else:
        drawn = Table(*HEAD)
        for line in table[1:]:
            drawn.add_row(*line)
        console.print(drawn)
    for killed in done:
        if killed.served_s is None:
            console.print(
                f"kill {killed.index} ({killed.role}, {killed.title}) was not got over: {killed.code=}"
            )
            console.print("  " + "\n  ".join(killed.said), markup=False)
    for kind, texts in (("orphan", orphans), *found.by_kind()):
        for text in texts[:20]:
            console.print(f"{kind}: {text}", style="red", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="in all, those of earlier calls included")
    parser.add_argument("--slice", type=int, default=25, help="kills between two audits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--roles", nargs="+", default=[*ring.ROLES, ring.DRIVER])
    parser.add_argument("--kinds", nargs="+", default=[*ring.KINDS], choices=[*ring.KINDS])
    parser.add_argument(
        "--patience", type=float, default=180.0, help="seconds; a part not back by then is not"
    )
    parser.add_argument("--rejudge", type=int, default=400, help="captions that are judged again")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="conf keys")
    args = parser.parse_args()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the run too
    chaos = Chaos(args.out, args.set, console)
    planned = ring.plan(args.seed, args.kills, args.roles, args.kinds)
    while True:
        todo = planned[len(chaos.done()) :]
        if todo:
            chaos.slice(todo[: args.slice], args.patience)
        done = chaos.done()
        found = audit(
            chaos.folder, chaos.config, [k.time for k in done], rejudge=args.rejudge, seed=args.seed
        )
        result = totals(done, found, chaos.orphans())
        if len(done) >= len(planned):
            break
        console.print(result)
    show(console, done, found, chaos.orphans(), args.markdown)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
