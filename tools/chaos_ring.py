"""A run that is made to suffer: which part is killed when, how its phase is seen, and when it is back."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from caprl_async.replay.ledger import open_ledger
from caprl_async.types import Version

ROLES = {"rollout": "rollout-0", "judge": "judge-0", "queue": "replay-queue", "learner": "learner-0"}
"""Of the actors: role -> name in the ring, which its process's title begins with."""
HELDOUT = {"heldout": "heldout-judge-0"}
DRIVER = "driver"

SHOWN = {
    "captioning": "generation",
    "judging": "judging",
    "receiving": "transfer",
    "sending": "transfer",
    "training": "step",
    "copying": "checkpoint",
    "writing": "checkpoint",
}
"""First word of what a title says a process is doing -> phase."""
PHASES = ("generation", "judging", "transfer", "step", "checkpoint")
_SHOWS = dict(zip(PHASES, ("rollout-0", "judge-0", "learner-0", "learner-0", "learner-0"), strict=True))
"""Phase -> the actor in whose title it is looked for, unless the one to be killed has it too."""

KINDS = {"kill": 0.76, "stop": 0.16, "memory": 0.08}
"""SIGKILL, SIGSTOP (a hang) or no more memory -> its share."""

_MARK = "CAPRL_CHAOS"
_ROOM = 4 << 20  # bytes that an actor may still allocate whose memory is limited
_STARVE_S = 10.0  # one that lives on for so long is killed
_POLL_S = 0.002
_LOOK_S = 0.2
_END_S = 120.0


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Kill:
    """What is to be done to which part, and when."""

    index: int
    role: str
    phase: str
    kind: str
    pause_s: float  # beforehand


def plan(seed: int, kills: int, roles: Sequence[str], kinds: Sequence[str] = tuple(KINDS)) -> list[Kill]:
    """The first `kills` of an endless plan: every (role, phase) once, in a random order, again and again.

    The roles take turns. Kinds have their shares in each such round; for those that are not in `kinds` comes
    the first that is. A driver is not starved: it only passes messages on, and is killed instead.
    """
    planned: list[Kill] = []
    while len(planned) < kills:
        rng = random.Random(f"{seed}/{len(planned)}")
        order = {role: rng.sample(PHASES, len(PHASES)) for role in roles}
        turns = [rng.sample(list(roles), len(roles)) for _ in PHASES]
        cells = [(role, order[role][turn]) for turn, mixed in enumerate(turns) for role in mixed]
        places = rng.sample(range(len(cells)), len(cells))
        starved = [i for i in places if cells[i][0] != DRIVER][: round(KINDS["memory"] * len(cells))]
        stopped = [i for i in places if i not in starved][: round(KINDS["stop"] * len(cells))]
        for i, (role, phase) in enumerate(cells):
            kind = "memory" if i in starved else "stop" if i in stopped else "kill"
            pause_s = rng.uniform(0.0, 5.0)
            kind = kind if kind in kinds else kinds[0]
            if (role, kind) == (DRIVER, "memory"):
                kind = "kill"
            planned.append(Kill(len(planned), role, phase, kind, pause_s))
    return planned[:kills]


# ---------------------------------------------------------------- processes


def title(pid: int) -> str:
    """What a process calls itself; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def phases(text: str) -> set[str]:
    """The phases that a title shows."""
    _, _, doing = text.removeprefix("ray::").partition(": ")
    first = {what.partition(" ")[0] for what in doing.split(", ")}
    return {SHOWN[word] for word in first if word in SHOWN}


def named(text: str) -> str:
    """The actor whose title it is; empty if it is none's."""
    return text[len("ray::") :].partition(":")[0] if text.startswith("ray::") else ""


def shown_by(role: str, phase: str) -> str:
    """The actor whose title shows the phase in which a part of this role is to be killed."""
    if role == "rollout" and phase == "transfer":
        return ROLES["rollout"]
    if role == "heldout" and phase == "judging":
        return HELDOUT["heldout"]
    return _SHOWS[phase]


class Run:
    """One process of `python -m caprl_async.run`, and all that it starts."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.log = folder / "run.log"
        self.began = time.time()
        self._mark = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "caprl_async.run", *arguments],
                env={**os.environ, _MARK: self._mark},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us
            )
        self._watched = False  # it has a child that is the driver

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._child.poll()

    def said(self, lines: int = 12) -> list[str]:
        """The last lines of its output."""
        return self.log.read_text(errors="replace").splitlines()[-lines:]

    def pids(self, role: str) -> list[int]:
        """Processes of this role; two, while one hangs and its successor comes up."""
        if role == DRIVER:
            return self._drivers()
        name = {**ROLES, **HELDOUT}[role]
        return [pid for pid in _all_pids() if named(title(pid)) == name and self._is_ours(pid)]

    def _drivers(self) -> list[int]:
        try:
            children = psutil.Process(self._child.pid).children()
        except psutil.NoSuchProcess:
            return []
        drivers = [child.pid for child in children if " -m caprl_async.run" in title(child.pid)]
        self._watched = self._watched or bool(drivers)
        return drivers if self._watched else [self._child.pid]

    def _is_ours(self, pid: int) -> bool:
        try:
            return f"{_MARK}={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def left(self) -> list[int]:
        """Live processes of the run."""
        return [pid for pid in _all_pids() if pid != os.getpid() and self._is_ours(pid) and title(pid)]

    def end(self) -> list[str]:
        """Ends it as a user would; returns the titles of processes that are left behind, and kills them."""
        if self.code is None:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_S)
        deadline = time.monotonic() + _END_S / 2
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        titles = [f"{pid} {title(pid)[:150]}" for pid in left]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.code is None:
            self._child.wait(_END_S)
        return titles


def _all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def find_phase(run: Run, kill: Kill, patience_s: float) -> tuple[int, str]:
    """Waits for the phase. Returns the pid to kill, and what the title that shows the phase says.

    Without it after `patience_s`, or if the run has ended, the title is as it is then; pid 0: there is none.
    """
    name = shown_by(kill.role, kill.phase)
    role = next(role for role, actor in {**ROLES, **HELDOUT}.items() if actor == name)
    deadline = time.monotonic() + patience_s
    seen = ""
    while time.monotonic() < deadline and run.code is None:
        targets, shows = run.pids(kill.role), run.pids(role)
        if not targets or not shows:
            time.sleep(_LOOK_S)
            continue
        # Newest last: the older one of two hangs, and goes.
        target, show = max(targets, key=_born), max(shows, key=_born)
        while (seen := title(show)) and time.monotonic() < deadline:
            if kill.phase in phases(seen):
                return target, seen
            time.sleep(_POLL_S)
    targets = run.pids(kill.role) if run.code is None else []
    return (max(targets, key=_born) if targets else 0), seen


def _born(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def strike(pid: int, kind: str) -> float:
    """Does it; returns when the process died or stopped."""
    if kind == "stop":
        os.kill(pid, signal.SIGSTOP)
        return time.time()
    if kind == "memory":
        process = psutil.Process(pid)
        most = process.memory_info().vms + _ROOM
        process.rlimit(psutil.RLIMIT_AS, (most, most))
        deadline = time.monotonic() + _STARVE_S
        while title(pid) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not title(pid):
            return time.time()
    os.kill(pid, signal.SIGKILL)
    return time.time()


# ---------------------------------------------------------------- signs of life


@dataclass(frozen=True)
class Mark:
    """Where the ledger stood when a part was killed."""

    seq: int
    epoch: int


def mark(ledger: Path) -> Mark:
    with closing(open_ledger(ledger)) as db:
        seq = db.execute("select coalesce(max(seq), 0) from events").fetchone()[0]
        last = db.execute("select version from events order by seq desc limit 1").fetchone()
    return Mark(seq, Version.parse(last[0]).epoch if last else 0)


def first_sign(ledger: Path, role: str, before: Mark, killed: float, back: float) -> float | None:
    """When the ledger first shows that the successor of a part serves; None if it does not yet.

    A rollout's is a group that was begun after the kill, a judge's a group that it has judged, the queue's
    any row, the learner's and driver's a step that began after the kill; a learner's is of a new epoch.

    Args:
        killed: when it was.
        back: when its successor's process was first seen.
    """
    with closing(open_ledger(ledger)) as db:
        rows: Iterable[tuple[float, str, float | None]]
        if role == "rollout":
            rows = db.execute(
                "select time, version, json_extract(detail, '$.started') from events "
                "where seq > ? and event = 'judging' and json_extract(detail, '$.peer') = ?",
                (before.seq, ROLES[role]),
            )
            return min((at for at, _, started in rows if started and started > killed), default=None)
        if role == "judge":
            rows = db.execute(
                "select time, version, null from events join judged using(seq) where seq > ? and peer = ?",
                (before.seq, ROLES[role]),
            )
            return min((at for at, _, _ in rows if at > back), default=None)
        if role == "queue":
            rows = db.execute("select time, version, null from events where seq > ?", (before.seq,))
            return min((at for at, _, _ in rows if at > back), default=None)
        rows = db.execute(
            "select time, version, json_extract(detail, '$.started') from events "
            "where seq > ? and event = 'step'",
            (before.seq,),
        )
        oldest = before.epoch + (role == "learner")
        return min(
            (at for at, v, started in rows if started and started > killed and _epoch(v) >= oldest),
            default=None,
        )


def _epoch(version: str) -> int:
    return Version.parse(version).epoch


@dataclass(frozen=True)
class Recovery:
    """How a kill was got over; `code`: the run has ended instead."""

    pid: int | None  # of the successor
    back_s: float | None  # until its process was seen
    served_s: float | None  # until it served
    code: int | None = None


def await_recovery(
    run: Run, ledger: Path, kill: Kill, old: int, before: Mark, killed: float, patience_s: float
) -> Recovery:
    """Waits until the killed part serves again."""
    pid, back = None, None
    deadline = killed + patience_s
    while time.time() < deadline:
        code = run.code
        if code is not None:
            return Recovery(pid, back - killed if back else None, None, code)
        if back is None:
            pid = next((found for found in run.pids(kill.role) if found != old), None)
            back = time.time() if pid is not None else None
        if back is not None:
            sign = _sign(run, ledger, kill.role, before, killed, back)
            if sign is not None:
                return Recovery(pid, back - killed, sign - killed)
        time.sleep(_LOOK_S)
    return Recovery(pid, back - killed if back else None, None)


def _sign(run: Run, ledger: Path, role: str, before: Mark, killed: float, back: float) -> float | None:
    if role == "heldout":  # its verdicts are not in the ledger
        judging = any("judging" in phases(title(pid)) for pid in run.pids(role))
        return time.time() if judging else None
    try:
        return first_sign(ledger, role, before, killed, back)
    except sqlite3.Error:  # its writer has just died, and left the file for the next one to mend
        return None


def await_step(run: Run, ledger: Path, patience_s: float) -> bool:
    """Waits until a run that was just started has trained a step; False if it ends or does not get there."""
    deadline = time.monotonic() + patience_s
    while run.code is None and time.monotonic() < deadline:
        if ledger.is_file():
            with contextlib.suppress(sqlite3.Error):
                if first_sign(ledger, DRIVER, Mark(0, 0), run.began, run.began) is not None:
                    return True
        time.sleep(_LOOK_S)
    return False
