"""Prints a sample's whole life from a run's ledger, or, without a sample, what the ledger holds."""

from __future__ import annotations

import sqlite3
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.conf_files import RECORDED
from caprl_async.config import Config
from caprl_async.observe.lineage import Told, clock
from caprl_async.replay.events import Event, EventRow, audit_rows, surviving
from caprl_async.replay.reading import Reading, SampleName, UnknownSample

_CONF, _LEDGER = RECORDED
_WIDTH = 150  # where no terminal sets one
_NEWEST = 5  # samples named of each kind


def run(config: Config) -> None:
    """Reads only; the run may be going on.

    Raises:
        ConfError: there is no such run or sample.
    """
    folder = Path(config.run)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    theirs = conf.read([folder / _CONF])
    try:
        with Reading(folder / _LEDGER) as reading:
            if config.sample:
                name = SampleName.parse(config.sample)
                Told(theirs, folder, console).story(reading.story(name), name)
            else:
                _summary(reading, theirs, folder, console)
    except UnknownSample as error:
        raise ConfError(f"sample={config.sample} in run={folder}: {error}") from error
    except sqlite3.Error as error:
        raise ConfError(f"{folder / _LEDGER} cannot be read: {error}") from error


# ---------------------------------------------------------------- without a sample


def _summary(reading: Reading, theirs: Config, folder: Path, console: Console) -> None:
    rows = reading.rows()
    for line in _lines(rows, reading, theirs, folder):
        console.print(Text(line), soft_wrap=True)


def _lines(rows: list[EventRow], reading: Reading, theirs: Config, folder: Path) -> Sequence[str]:
    kept = surviving(rows)
    audit = audit_rows(rows, theirs.replay.max_staleness, reading.folded)
    steps = [row for row in kept if row.event is Event.STEP]
    lines = [f"{folder}"]
    if rows:
        lines.append(f"  from {clock(rows[0].time)} to {clock(rows[-1].time)}, {len(rows)} rows")
    lines += [
        f"  {audit['admitted']} prompts admitted: {_counts(audit['ended'])}, "
        f"{audit['outstanding']} on their way",
        f"  evicted: {_counts(audit['evicted'])}; tried again: {_counts(audit['retried'])}",
        f"  {len(steps)} learner steps, the newest weights are {_newest_version(kept)}; "
        f"{len(list((folder / 'batches').glob('*.msgpack')))} batches in batches/",
    ]
    if reading.folded.admitted:
        lines.append(f"  {reading.folded.admitted} old prompts are kept as totals only (replay.ledger_mb)")
    void = {row.seq for row in rows} - {row.seq for row in kept}
    for row in reading.epochs:
        lost = sum(row.detail["voids_after"] < seq < row.seq for seq in void)
        lines.append(
            f"  epoch {row.version.epoch} went back to step {row.version.step}, {clock(row.time)}: "
            f"{lost} rows before it are void"
        )
    lines.append(f"  not as promised: {'; '.join(audit['violations']) or 'nothing'}")
    lines += [f"  newest {what}: {', '.join(names)}" for what, names in _newest(kept).items()]
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items())) or "none"


def _newest_version(kept: Sequence[EventRow]) -> str:
    made = [row.version for row in kept if row.event in (Event.STEP, Event.EPOCH)]
    return str(made[-1]) if made else "those of the start"


def _newest(kept: Sequence[EventRow]) -> dict[str, list[str]]:
    """What happened last -> names of samples to look at, the newest first."""
    last = {row.key: row for row in kept if row.key}
    found: dict[str, list[str]] = {}
    taken: Counter[str] = Counter()
    for row in sorted(last.values(), key=lambda row: -row.seq):
        what = row.event.value
        if row.event is Event.EVICTED:
            what += f" ({row.detail['reason']})"
        if taken[what] < _NEWEST:
            found.setdefault(what, []).append(f"{row.key}@{row.attempt}")
        taken[what] += 1
    return found
