"""What a run's ledger says of one prompt, read beside the hub that may be writing it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from caprl_async.replay.events import Event, EventRow, Totals, is_voided
from caprl_async.replay.ledger import event_rows, folded_totals, open_ledger
from caprl_async.replay.queue import Kept
from caprl_async.types import Caption, Question, Verdict, Version

_NAME = re.compile(r"(train/\d+)(?:@(\d+))?(?:#(\d+))?")
_VERDICTS = msgspec.msgpack.Decoder(tuple[tuple[Verdict, ...], ...])
_QUESTIONS = msgspec.json.Decoder(tuple[Question, ...])


class UnknownSample(LookupError):
    """The ledger has no such sample; the message says what there is."""


@dataclass(frozen=True)
class SampleName:
    """`train/17`, `train/17@0` (an attempt) or `train/17@0#3` (a caption)."""

    key: str
    attempt: int | None = None
    caption: int | None = None

    @classmethod
    def parse(cls, text: str) -> SampleName:
        """
        Raises:
            UnknownSample: it is no name.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            raise UnknownSample("a sample's name is of the form train/17, train/17@0 or train/17@0#3")
        key, attempt, caption = match.groups()
        return cls(key, *(None if part is None else int(part) for part in (attempt, caption)))


@dataclass(frozen=True)
class Sample:
    """One judged caption."""

    position: int
    text: str
    tokens: int
    finish: str
    spans: tuple[tuple[str, int, int], ...]  # (version, start, end) of its tokens
    reward: float | None
    terms: dict[str, Any]  # what the reward is made of


@dataclass(frozen=True)
class Training:
    """One time that a group was cut into a batch: twice if a rollback lay between."""

    cut: EventRow
    trained: EventRow | None  # None: the learner has it, or never came to the end
    step: EventRow | None
    voided: bool

    def advantages(self, samples: Sequence[Sample]) -> dict[int, float]:
        """By caption number; those without a reward have none, and the learner may not have told any."""
        rewarded = [sample.position for sample in samples if sample.reward is not None]
        known = self.trained.detail.get("advantages", ()) if self.trained is not None else ()
        return dict(zip(rewarded, known, strict=True)) if len(known) == len(rewarded) else {}


@dataclass(frozen=True)
class Judgement:
    """The verdicts on one attempt's captions, and what came of them."""

    row: EventRow  # `ready`, or `evicted`
    voided: bool
    peer: str
    rotation: int
    questions: tuple[Question, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]  # [caption][question]
    blind: tuple[Verdict, ...]  # on an empty caption; empty without `reward.blind`
    samples: tuple[Sample, ...]
    trainings: tuple[Training, ...] = ()


@dataclass(frozen=True)
class Story:
    """A prompt's whole life; rows that a rollback has voided are in it too."""

    key: str
    rows: tuple[EventRow, ...]  # its own, and those of the rollbacks that voided some
    voided: frozenset[int]  # seq of those rows
    judgements: tuple[Judgement, ...]
    waiting: tuple[Caption, ...] = field(default=())  # captions that no judge has answered for yet
    waiting_attempt: int | None = None

    def admitted(self) -> EventRow | None:
        return next((row for row in reversed(self.rows) if row.event is Event.ADMITTED), None)

    def attempts(self) -> list[int]:
        return sorted({row.attempt for row in self.rows if row.attempt is not None})


class Reading:
    """A ledger at one moment. A context: nothing is kept from the hub for longer than it lasts.

    Raises:
        FileNotFoundError: there is none.
        sqlite3.Error: it is no ledger.
    """

    def __init__(self, path: Path) -> None:
        self._db = open_ledger(path)
        self._db.execute("begin")
        self.run_rows = list(event_rows(self._db, "key = ''"))
        self.epochs = [row for row in self.run_rows if row.event is Event.EPOCH]
        self.folded: Totals = folded_totals(self._db)
        (self.identity,) = self._db.execute("select value from notes where name = 'id'").fetchone()

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def rows(self) -> list[EventRow]:
        """Every row of the file."""
        return list(event_rows(self._db))

    def voided(self, seq: int) -> bool:
        """Whether a later rollback went back behind this row; rows of rollbacks stay."""
        return is_voided(seq, self.epochs)

    # ------------------------------------------------------------ one prompt

    def story(self, name: SampleName) -> Story:
        """
        Raises:
            UnknownSample: the ledger has no such prompt, attempt or caption.
        """
        own = list(event_rows(self._db, "key = ?", name.key))
        if not own:
            raise UnknownSample(self._why_unknown(name.key))
        rollbacks = [epoch for epoch in self.epochs if any(is_voided(row.seq, [epoch]) for row in own)]
        rows = sorted([*own, *rollbacks], key=lambda row: row.seq)
        voided = frozenset(row.seq for row in own if self.voided(row.seq))
        judged = [row for row in own if row.event in (Event.READY, Event.EVICTED)]
        found = [self._judgement(row, own) for row in judged]
        attempt, waiting = self._waiting(name.key)
        judgements = tuple(one for one in found if one is not None)
        story = Story(name.key, tuple(rows), voided, judgements, waiting, attempt)
        _check(name, story)
        return story

    def questions(self, seq: int) -> tuple[Question, ...] | None:
        """Those of the `ready` row `seq`; None if it is not kept."""
        found = self._db.execute("select questions from judged where seq = ?", (seq,)).fetchone()
        return _QUESTIONS.decode(found[0]) if found else None

    def _judgement(self, row: EventRow, own: Sequence[EventRow]) -> Judgement | None:
        found = self._db.execute(
            "select peer, rotation, questions, verdicts from judged where seq = ?", (row.seq,)
        ).fetchone()
        if found is None:  # evicted before any judge had answered
            return None
        peer, rotation, questions, verdicts = found
        said = _VERDICTS.decode(verdicts)
        samples = self._samples(row.seq)
        blind = said[0] if len(said) == len(samples) + 1 else ()
        return Judgement(
            row=row,
            voided=self.voided(row.seq),
            peer=peer,
            rotation=rotation,
            questions=_QUESTIONS.decode(questions),
            verdicts=said[1:] if blind else said,
            blind=blind,
            samples=samples,
            trainings=tuple(self._trainings(row, own)),
        )

    def _samples(self, seq: int) -> tuple[Sample, ...]:
        query = (
            "select position, text, tokens, finish, spans, reward, terms from samples where seq = ? "
            "order by position"
        )
        return tuple(
            Sample(
                *(position, text, tokens, finish),
                spans=tuple((version, start, end) for version, start, end in json.loads(spans)),
                reward=reward,
                terms=json.loads(terms),
            )
            for position, text, tokens, finish, spans, reward, terms in self._db.execute(query, (seq,))
        )

    def _trainings(self, ready: EventRow, own: Sequence[EventRow]) -> Iterable[Training]:
        """The batches that took the group of this `ready` row, up to the next that was judged."""
        later = [row for row in own if row.seq > ready.seq and row.attempt == ready.attempt]
        again = (row.seq for row in later if row.event is Event.READY)
        until = next(again, None)
        mine = [row for row in later if until is None or row.seq < until]
        for row, following in pairwise([*mine, None]):
            if row is None or row.event is not Event.CUT:
                continue
            done = following if following is not None and following.event is Event.TRAINED else None
            made = Version(row.version.epoch, row.version.step + 1)
            # A run that begins again at its beginning makes the same versions again.
            steps = (
                r for r in self.run_rows if r.seq > row.seq and r.event is Event.STEP and r.version == made
            )
            yield Training(row, done, next(steps, None), self.voided(row.seq))

    def _waiting(self, key: str) -> tuple[int | None, tuple[Caption, ...]]:
        """The captions of a prompt that has arrived at the queue and has not been judged."""
        query = "select attempt, data from journal where key = ? and stage = ?"
        found = self._db.execute(query, (key, Event.JUDGING.value)).fetchone()
        if found is None:
            return None, ()
        return found[0], msgspec.msgpack.decode(found[1], type=Kept).group.captions

    def _why_unknown(self, key: str) -> str:
        index = int(key.rpartition("/")[2])
        first, last = self._db.execute(
            "select min(prompt_index), max(prompt_index) from events where prompt_index is not null"
        ).fetchone()
        if index <= self.folded.newest:
            return (
                f"{key} has ended and its rows are gone: the ledger has folded {self.folded.admitted} old "
                f"prompts into totals (replay.ledger_mb); it holds train/{first} to train/{last}"
            )
        if last is None:
            return f"there is no {key}: no prompt has been admitted yet"
        return f"there is no {key}: the ledger holds train/{first} to train/{last}"


def _check(name: SampleName, story: Story) -> None:
    """
    Raises:
        UnknownSample: the prompt has no such attempt or caption.
    """
    attempts = story.attempts()
    if name.attempt is not None and name.attempt not in attempts:
        had = ", ".join(f"{name.key}@{attempt}" for attempt in attempts)
        raise UnknownSample(f"there is no {name.key}@{name.attempt}: there is {had}")
    if name.caption is None:
        return
    asked = [one for one in story.judgements if name.attempt in (None, one.row.attempt)]
    if any(name.caption < len(one.samples) for one in asked):
        return
    if name.attempt in (None, story.waiting_attempt) and name.caption < len(story.waiting):
        return
    counts = [f"{story.key}@{one.row.attempt}#0 to #{len(one.samples) - 1}" for one in asked]
    raise UnknownSample(f"no such caption: there is {', '.join(counts) or 'none that was judged'}")
