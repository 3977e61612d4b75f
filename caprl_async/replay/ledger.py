"""Every prompt's life, on disk: one append-only table of events in SQLite, and the journal of live groups.

`events` rows of one prompt, in order of `seq`:

| event | version | detail |
|---|---|---|
| admitted | learner's | row_id |
| generating | engine's at the lease | peer |
| judging (its captions arrived) | oldest token's | peer, started, finished, tokens |
| ready (its verdicts arrived) | learner's | rewards, and their terms: accuracy, length, format, cost |
| cut (into the batch of `version`) | batch's | oldest |
| trained (the batch of `version` is trained) | batch's | - |
| evicted | learner's | reason |
| retried (as `attempt`) | learner's | reason |

Rows of the run, with an empty key: `step` (version after it; started, finished) and `epoch` (its version;
`voids_after`: rows with a greater seq that stand before this one belong to steps that were rolled back).
Times are seconds of `time.time()`.
"""

from __future__ import annotations

import enum
import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprl_async.types import Version


class LedgerError(RuntimeError):
    """The ledger was asked for something that must not happen, or does not fit the run."""


class Event(enum.Enum):
    ADMITTED = "admitted"
    GENERATING = "generating"
    JUDGING = "judging"
    READY = "ready"
    CUT = "cut"
    TRAINED = "trained"
    EVICTED = "evicted"
    RETRIED = "retried"
    STEP = "step"
    EPOCH = "epoch"


_ENDS = frozenset({Event.TRAINED, Event.EVICTED})
_NEXT: dict[Event, frozenset[Event]] = {
    Event.ADMITTED: frozenset({Event.GENERATING, Event.EVICTED, Event.RETRIED}),
    Event.RETRIED: frozenset({Event.GENERATING, Event.EVICTED, Event.RETRIED}),
    Event.GENERATING: frozenset({Event.JUDGING, Event.RETRIED, Event.EVICTED}),
    Event.JUDGING: frozenset({Event.READY, Event.RETRIED, Event.EVICTED}),
    Event.READY: frozenset({Event.CUT, Event.RETRIED}),
    Event.CUT: frozenset({Event.TRAINED, Event.RETRIED}),
}

_SCHEMA = """
create table if not exists events(
    seq integer primary key, time real not null, key text not null, prompt_index integer, attempt integer,
    event text not null, version text not null, detail text not null);
create table if not exists meta(name text primary key, value text);
create table if not exists journal(key text primary key, attempt integer, stage text, data blob);
"""


@dataclass
class Lives:
    """State of every prompt that has not ended, and counts of those that have; pure, in memory.

    Raises LedgerError on a step that a prompt's life does not allow.
    """

    live: dict[int, tuple[Event, int]] = field(default_factory=dict)  # index -> state, attempt
    ended: Counter[str] = field(default_factory=Counter)
    admitted: int = 0
    newest: int = -1  # greatest index admitted

    def apply(self, index: int, attempt: int, event: Event) -> None:
        """Moves one prompt on."""
        if event is Event.ADMITTED:
            if index <= self.newest:
                raise LedgerError(f"prompt {index} is admitted twice")
            self.admitted += 1
            self.newest = max(self.newest, index)
            self.live[index] = (event, attempt)
            return
        state, current = self.live.get(index, (None, 0))
        if state is None:
            raise LedgerError(f"prompt {index} cannot become {event.value}: it has ended or never began")
        if event not in _NEXT[state] or attempt != current + (event is Event.RETRIED):
            raise LedgerError(
                f"prompt {index}, attempt {current}, is {state.value}; it cannot become {event.value} "
                f"(attempt {attempt})"
            )
        if event in _ENDS:
            del self.live[index]
            self.ended[event.value] += 1
        else:
            self.live[index] = (event, attempt)

    @property
    def counts(self) -> dict[str, int]:
        """Prompts by state, ended ones included."""
        return {**Counter(state.value for state, _ in self.live.values()), **self.ended}


class Ledger:
    """The table of events and the journal; rows are written at once and committed by `commit`."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            LedgerError: the file cannot be opened or is no ledger.
        """
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=normal")
            self._db.executescript(_SCHEMA)
            self._db.execute("insert or ignore into meta values('id', ?)", (uuid.uuid4().hex,))
            self.identity: str = self._db.execute("select value from meta where name = 'id'").fetchone()[0]
            self.position: int = self._db.execute("select coalesce(max(seq), 0) from events").fetchone()[0]
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: {error}") from error
        self.lives = _replay(self._rows())
        self._dirty = False

    def record(
        self, key: str, index: int, attempt: int, event: Event, version: Version, **detail: Any
    ) -> None:
        """Writes one step of a prompt's life.

        Raises:
            LedgerError: its life does not allow this step.
        """
        self.lives.apply(index, attempt, event)
        self._insert(key, index, attempt, event, version, detail)

    def record_run(self, event: Event, version: Version, **detail: Any) -> None:
        """Writes a row of the run itself (`step`)."""
        self._insert("", None, None, event, version, detail)

    def roll_back(self, position: int, version: Version) -> None:
        """Voids every row after `position`, by a row; prompts are again in the state they had there.

        Raises:
            LedgerError: the file has no such position.
        """
        if position > self.position:
            raise LedgerError(
                f"{self.path} ends at row {self.position}, the checkpoint was cut at row {position}: "
                "the file has been cut short or replaced"
            )
        self._insert("", None, None, Event.EPOCH, version, {"voids_after": position})
        self._db.execute("delete from journal")
        self.lives = _replay(self._rows())

    def journal(self, key: str, attempt: int, stage: str, data: bytes) -> None:
        """Keeps a live group's bytes (a CaptionGroup at `judging`, a ScoredGroup at `ready`)."""
        self._begin()
        self._db.execute("insert or replace into journal values(?, ?, ?, ?)", (key, attempt, stage, data))

    def forget(self, keys: Iterable[str]) -> None:
        """Drops groups that have ended or will be made again from the journal."""
        self._begin()
        self._db.executemany("delete from journal where key = ?", [(key,) for key in keys])

    def journalled(self) -> dict[str, tuple[int, str, bytes]]:
        """key -> (attempt, stage, bytes) of every live group."""
        rows = self._db.execute("select key, attempt, stage, data from journal")
        return {key: (attempt, stage, data) for key, attempt, stage, data in rows}

    def commit(self) -> None:
        """Makes everything recorded so far durable; cheap when there is nothing."""
        if self._dirty:
            self._db.execute("commit")
            self._dirty = False

    def audit(self, max_staleness: int) -> dict[str, Any]:
        """Reads the whole table afresh; see `audit_rows`."""
        self.commit()
        return audit_rows(self._rows(), max_staleness)

    def close(self) -> None:
        self.commit()
        self._db.close()

    def _begin(self) -> None:
        if not self._dirty:
            self._db.execute("begin")
            self._dirty = True

    def _insert(
        self,
        key: str,
        index: int | None,
        attempt: int | None,
        event: Event,
        version: Version,
        detail: dict[str, Any],
    ) -> None:
        self._begin()
        self.position += 1
        self._db.execute(
            "insert into events values(?, ?, ?, ?, ?, ?, ?, ?)",
            (self.position, time.time(), key, index, attempt, event.value, str(version), json.dumps(detail)),
        )

    def _rows(self) -> Iterator[EventRow]:
        query = "select seq, key, prompt_index, attempt, event, version, detail from events order by seq"
        rows = self._db.execute(query)
        return (
            EventRow(s, k, i, a, Event(e), Version.parse(v), json.loads(d)) for s, k, i, a, e, v, d in rows
        )


@dataclass(frozen=True)
class EventRow:
    """One row of `events`, decoded."""

    seq: int
    key: str
    index: int | None
    attempt: int | None
    event: Event
    version: Version
    detail: dict[str, Any]


def surviving(rows: Iterable[EventRow]) -> list[EventRow]:
    """The rows that no later epoch has voided; epoch rows themselves stay."""
    kept: list[EventRow] = []
    for row in rows:
        if row.event is Event.EPOCH:
            after = row.detail["voids_after"]
            kept = [old for old in kept if old.seq <= after or old.event is Event.EPOCH]
        kept.append(row)
    return kept


def _replay(rows: Iterable[EventRow]) -> Lives:
    lives = Lives()
    for row in surviving(rows):
        if row.index is not None and row.attempt is not None:
            lives.apply(row.index, row.attempt, row.event)
    return lives


def audit_rows(rows: Iterable[EventRow], max_staleness: int) -> dict[str, Any]:
    """Whether every admitted prompt ended once or is outstanding, and no batch took a token that is too old.

    Returns:
        `admitted`, `outstanding`, `ended` (by `trained` and `evicted`), `evicted` and `retried` (by reason),
        `violations`: what is not as promised, in words.
    """
    lives = Lives()
    evicted: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    violations: list[str] = []
    for row in surviving(rows):
        if row.index is None or row.attempt is None:
            continue
        try:
            lives.apply(row.index, row.attempt, row.event)
        except LedgerError as error:
            violations.append(f"row {row.seq}: {error}")
        if row.event is Event.EVICTED:
            evicted[row.detail["reason"]] += 1
        if row.event is Event.RETRIED:
            retried[row.detail["reason"]] += 1
        if row.event is Event.CUT:
            oldest = Version.parse(row.detail["oldest"])
            if oldest.epoch != row.version.epoch or row.version.step - oldest.step > max_staleness:
                violations.append(f"row {row.seq}: {row.key} of version {oldest} is cut at {row.version}")
    if lives.admitted != len(lives.live) + sum(lives.ended.values()):
        violations.append(f"{lives.admitted} admitted, {len(lives.live)} live, {dict(lives.ended)} ended")
    return {
        "admitted": lives.admitted,
        "outstanding": len(lives.live),
        "ended": dict(lives.ended),
        "evicted": dict(evicted),
        "retried": dict(retried),
        "violations": violations,
    }
