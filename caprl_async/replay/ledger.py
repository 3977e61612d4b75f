"""Every prompt's life, on disk: append-only tables in SQLite, and the journal of live groups.

`events` rows of one prompt, in order of `seq`:

| event | version | detail |
|---|---|---|
| admitted | learner's | row_id, image (sha256) |
| generating | engine's at the lease | peer |
| judging (its captions arrived) | oldest token's | peer, started, finished, tokens |
| ready (its verdicts arrived) | learner's | - |
| cut (into the batch of `version`) | batch's | oldest, at |
| trained (the batch of `version` is trained) | batch's | advantages, one per caption with a reward |
| evicted | learner's | reason |
| retried (as `attempt`) | learner's | reason |

Rows of the run, with an empty key: `step` (version after it; started, finished) and `epoch` (its version;
`voids_after`: rows with a greater seq that stand before this one belong to steps that were rolled back).

`judged` and `samples` belong to the `ready` or `evicted` row of the same seq: who judged, which questions,
every verdict; and each caption with its text, tokens, the versions of its tokens, and its reward with the
terms it is made of. Caption i of a prompt is called `train/17@0#i`, 0 being the attempt.

`journal`, `notes` and `spreads` are the hub's memory: what it needs to go on when its process has died.
Times are seconds of `time.time()`.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from caprl_async.replay.events import (
    Event,
    EventRow,
    LedgerError,
    Lives,
    Totals,
    audit_rows,
    replay,
    surviving,
)
from caprl_async.reward.reward import TERMS
from caprl_async.types import Caption, Question, RewardParts, Verdict, Version

_SCHEMA = """
create table if not exists events(
    seq integer primary key, time real not null, key text not null, prompt_index integer, attempt integer,
    event text not null, version text not null, detail text not null);
create index if not exists events_key on events(key);
create table if not exists judged(
    seq integer primary key, peer text not null, rotation integer not null, questions text not null,
    verdicts blob not null);
create table if not exists samples(
    seq integer, position integer, text text not null, tokens integer not null, finish text not null,
    spans text not null, reward real, terms text not null, primary key(seq, position)) without rowid;
create table if not exists notes(name text primary key, value text);
create table if not exists journal(key text primary key, attempt integer, stage text, data blob);
create table if not exists spreads(question_id text primary key, variance real);
"""
_FOLDED, _POSITION = "folded", "position"
_BUSY_S = 5.0  # a reader that copies the file may hold it for so long


@dataclass(frozen=True)
class Judged:
    """What a judge said of one group, for the ledger."""

    peer: str
    rotation: int
    questions: tuple[Question, ...]
    captions: tuple[Caption, ...]
    parts: Sequence[RewardParts]  # of each caption
    verdicts: tuple[tuple[Verdict, ...], ...]  # [caption][question]; with `reward.blind` one row more, first


class Ledger:
    """The tables; rows are written at once and made durable by `commit`."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            LedgerError: the file cannot be opened or is no ledger.
        """
        self.path = path
        self.dirty = False
        try:
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=normal")
            self._db.executescript(_SCHEMA)
            self._db.execute("insert or ignore into notes values('id', ?)", (uuid.uuid4().hex,))
            self.identity: str = self.note("id")
            newest = self._db.execute("select coalesce(max(seq), 0) from events").fetchone()[0]
            self.position: int = max(newest, self.read_note(_POSITION) or 0)  # that row may be folded
            self.lives = self._replay()
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: {error}") from error

    # ------------------------------------------------------------ events

    def record(
        self, key: str, index: int, attempt: int, event: Event, version: Version, **detail: Any
    ) -> int:
        """Writes one step of a prompt's life; returns the row's seq.

        Raises:
            LedgerError: its life does not allow this step, or the disk is full.
        """
        self.lives.apply(index, attempt, event)
        return self._insert(key, index, attempt, event, version, detail)

    def record_step(self, version: Version, started: float, finished: float) -> None:
        """Writes that the learner has reached `version`; a second time for the same version is left out.

        A run without a checkpoint begins again at the version that it began with: its steps are new ones.
        """
        known = self._run(
            "select 1 from events where key = '' and event = 'step' and version = ? "
            "and seq > (select coalesce(max(seq), 0) from events where key = '' and event = 'epoch')",
            str(version),
        )
        if known.fetchone() is None:
            self._insert("", None, None, Event.STEP, version, {"started": started, "finished": finished})

    def record_judged(self, seq: int, judged: Judged) -> None:
        """Keeps verdicts and captions beside the `ready` or `evicted` row `seq`."""
        questions = msgspec.json.encode(judged.questions).decode()
        verdicts = msgspec.msgpack.encode(judged.verdicts)
        self._run(
            "insert into judged values(?, ?, ?, ?, ?)", seq, judged.peer, judged.rotation, questions, verdicts
        )
        for position, (caption, parts) in enumerate(zip(judged.captions, judged.parts, strict=True)):
            spans = [[str(span.version), span.start, span.end] for span in caption.spans]
            terms = {term: getattr(parts, term) for term in (*TERMS, "fact", "absent", "scored", "asked")}
            self._run(
                "insert into samples values(?, ?, ?, ?, ?, ?, ?, ?)",
                *(seq, position, caption.text, len(caption.token_ids), caption.finish.value),
                *(json.dumps(spans), parts.total, json.dumps(terms)),
            )

    def roll_back(self, position: int, version: Version) -> None:
        """Voids every row after `position`, by a row; prompts are again in the state they had there. At 0
        there are none, also of those whose rows are no longer kept.

        Raises:
            LedgerError: the file has no such position.
        """
        if position > self.position:
            raise LedgerError(
                f"{self.path} ends at row {self.position}, the checkpoint was cut at row {position}: "
                "the file has been cut short or replaced"
            )
        self._insert("", None, None, Event.EPOCH, version, {"voids_after": position})
        self._run("delete from journal")
        if position == 0:
            self._keep_folded(Totals())
        self.lives = self._replay()

    def begin_elsewhere(self, ended: int, newest: int, version: Version) -> None:
        """For a checkpoint of another ledger: `ended` prompts up to `newest` are none of this one's."""
        self.roll_back(0, version)
        self._keep_folded(Totals(admitted=ended, newest=newest, ended={"elsewhere": ended}))
        self.lives = self._replay()

    # ------------------------------------------------------------ the hub's memory

    def journal(self, key: str, attempt: int, stage: str, data: bytes) -> None:
        """Keeps a live group's bytes."""
        self._run("insert or replace into journal values(?, ?, ?, ?)", key, attempt, stage, data)

    def forget(self, keys: Iterable[str]) -> None:
        """Drops groups that have ended or will be made again from the journal."""
        for key in keys:
            self._run("delete from journal where key = ?", key)

    def journalled(self) -> dict[str, tuple[int, str, bytes]]:
        """key -> (attempt, stage, bytes) of every live group."""
        rows = self._db.execute("select key, attempt, stage, data from journal")
        return {key: (attempt, stage, data) for key, attempt, stage, data in rows}

    def write_note(self, name: str, value: Any) -> None:
        """Keeps plain data under a name, in the same transaction as the rows."""
        self._run("insert or replace into notes values(?, ?)", name, json.dumps(value))

    def read_note(self, name: str) -> Any:
        """What was kept under a name; None if nothing."""
        text = self.note(name)
        return json.loads(text) if text else None

    def count_up(self, name: str) -> int:
        """How often this has been called with this name, now included; durable at once."""
        count = int(self.read_note(name) or 0) + 1
        self.write_note(name, count)
        self.commit()
        return count

    def note(self, name: str) -> str:
        row = self._db.execute("select value from notes where name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def keep_spreads(self, spreads: Iterable[tuple[str, float]], *, anew: bool = False) -> None:
        """Remembers variances by question; `anew` forgets all others."""
        if anew:
            self._run("delete from spreads")
        for question, variance in spreads:
            self._run("insert or replace into spreads values(?, ?)", question, variance)

    def spreads(self) -> list[tuple[str, float]]:
        return self._db.execute("select question_id, variance from spreads").fetchall()

    # ------------------------------------------------------------ durability and size

    def commit(self) -> None:
        """Makes everything recorded so far durable; cheap when there is nothing.

        Raises:
            LedgerError: the disk is full.
        """
        if self.dirty:
            self._run("commit")
            self.dirty = False

    def sync(self) -> None:
        """`commit`, and safe from a loss of power too."""
        self.commit()
        self._db.execute("pragma wal_checkpoint(full)")

    def megabytes(self) -> float:
        """Size of what is stored; space of rows that were dropped is used again."""
        pages, free, size = (
            self._db.execute(f"pragma {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return float((pages - free) * size) / 2**20

    def fold(self, before: int) -> int:
        """Replaces the rows of prompts that had ended at row `before` by their totals; returns how many.

        Those that came after one that is still on its way there stay too: the totals are of all prompts up to
        an index.

        `before` must not lie behind the oldest position that `roll_back` may still be asked for.
        """
        self.commit()
        totals = self._folded()
        rows = [row for row in self.rows() if row.seq <= before]
        kept = surviving(rows)
        states = replay(kept, totals)
        oldest = min(states.live, default=states.newest + 1)
        keys = {row.key for row in kept if row.index is not None and row.index < oldest}
        if not keys:
            return 0
        gone = [row for row in kept if row.key in keys]
        reasons = {
            event: Counter(row.detail["reason"] for row in gone if row.event is event)
            for event in (Event.EVICTED, Event.RETRIED)
        }
        ended = Counter(row.event.value for row in gone if row.event in (Event.TRAINED, Event.EVICTED))
        totals = Totals(
            admitted=totals.admitted + len(keys),
            newest=max([totals.newest, *(row.index for row in gone if row.index is not None)]),
            ended=dict(Counter(totals.ended) + ended),
            evicted=dict(Counter(totals.evicted) + reasons[Event.EVICTED]),
            retried=dict(Counter(totals.retried) + reasons[Event.RETRIED]),
        )
        for seq in [row.seq for row in rows if row.key in keys]:
            for table in ("events", "judged", "samples"):
                self._run(f"delete from {table} where seq = ?", seq)
        self._keep_folded(totals)
        self.write_note(_POSITION, self.position)
        self.commit()
        return len(keys)

    def audit(self, max_staleness: int) -> dict[str, Any]:
        """Reads the whole table afresh; see `audit_rows`."""
        self.commit()
        return audit_rows(self.rows(), max_staleness, self._folded())

    def close(self) -> None:
        self.commit()
        self._db.close()

    def rows(self) -> Iterator[EventRow]:
        """Every row, in order."""
        return event_rows(self._db)

    # ------------------------------------------------------------ inside

    def _replay(self) -> Lives:
        return replay(surviving(self.rows()), self._folded())

    def _folded(self) -> Totals:
        return Totals(**(self.read_note(_FOLDED) or {}))

    def _keep_folded(self, totals: Totals) -> None:
        self.write_note(_FOLDED, asdict(totals))

    def _insert(
        self,
        key: str,
        index: int | None,
        attempt: int | None,
        event: Event,
        version: Version,
        detail: dict[str, Any],
    ) -> int:
        self.position += 1
        self._run(
            "insert into events values(?, ?, ?, ?, ?, ?, ?, ?)",
            *(self.position, time.time(), key, index, attempt, event.value, str(version), json.dumps(detail)),
        )
        return self.position

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            if not self.dirty:
                self._db.execute("begin")
                self.dirty = True
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:  # a full disk, above all
            raise LedgerError(f"{self.path} cannot be written: {error}; free space or mend that") from error


def read_rows(path: Path) -> list[EventRow]:
    """The rows of a ledger that another process may be writing.

    Raises:
        FileNotFoundError: there is none.
    """
    with closing(open_ledger(path)) as connection:
        return list(event_rows(connection))


def audit_file(path: Path, max_staleness: int) -> dict[str, Any]:
    """`audit_rows` of a ledger that another process may be writing.

    Raises:
        FileNotFoundError: there is none.
    """
    with closing(open_ledger(path)) as connection:
        return audit_rows(list(event_rows(connection)), max_staleness, folded_totals(connection))


def open_ledger(path: Path) -> sqlite3.Connection:
    """The file, to read only.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the run has no ledger")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)


def event_rows(connection: sqlite3.Connection, condition: str = "true", *values: Any) -> Iterator[EventRow]:
    """The rows that meet an SQL condition with these values for its question marks, in order."""
    query = (
        "select seq, key, prompt_index, attempt, event, version, detail, time from events "
        f"where {condition} order by seq"
    )
    return (
        EventRow(seq, key, index, attempt, Event(event), Version.parse(version), json.loads(detail), at)
        for seq, key, index, attempt, event, version, detail, at in connection.execute(query, values)
    )


def folded_totals(connection: sqlite3.Connection) -> Totals:
    """What is known of prompts whose rows are no longer kept."""
    folded = connection.execute("select value from notes where name = ?", (_FOLDED,)).fetchone()
    return Totals(**json.loads(folded[0])) if folded else Totals()
