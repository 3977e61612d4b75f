"""What can happen to a prompt, in which order, and what a run's rows of events say about it; pure."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from caprl_async.replay.staleness import descends
from caprl_async.types import Version


class LedgerError(RuntimeError):
    """The ledger was asked for something that must not happen, or does not fit the run."""


class Event(enum.Enum):
    """See the table in `ledger`."""

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
    time: float = 0.0


@dataclass
class Totals:
    """Prompts whose rows are no longer kept: all of them ended."""

    admitted: int = 0
    newest: int = -1  # greatest index among them
    ended: dict[str, int] = field(default_factory=dict)  # by event
    evicted: dict[str, int] = field(default_factory=dict)  # by reason
    retried: dict[str, int] = field(default_factory=dict)  # by reason


class Lives:
    """State of every prompt that has not ended, and counts of those that have; pure, in memory.

    Raises LedgerError on a step that a prompt's life does not allow.
    """

    def __init__(self, folded: Totals | None = None) -> None:
        folded = folded or Totals()
        self.live: dict[int, tuple[Event, int]] = {}  # index -> state, attempt
        self.ended: Counter[str] = Counter(folded.ended)
        self.admitted = folded.admitted
        self.newest = folded.newest  # greatest index admitted

    def apply(self, index: int, attempt: int, event: Event) -> None:
        """Moves one prompt on."""
        if event is Event.ADMITTED:
            if index <= self.newest:
                raise LedgerError(f"prompt {index} is admitted twice")
            self.admitted += 1
            self.newest = index
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


def surviving(rows: Iterable[EventRow]) -> list[EventRow]:
    """The rows that no later epoch has voided; epoch rows themselves stay."""
    every = list(rows)
    epochs = [row for row in every if row.event is Event.EPOCH]
    return [row for row in every if row.event is Event.EPOCH or not is_voided(row.seq, epochs)]


def is_voided(seq: int, epochs: Iterable[EventRow]) -> bool:
    """Whether one of the rollbacks `epochs` went back behind row `seq`, which came before it."""
    return any(row.detail["voids_after"] < seq < row.seq for row in epochs)


def replay(rows: Iterable[EventRow], folded: Totals | None = None) -> Lives:
    """The lives that surviving rows describe.

    Raises:
        LedgerError: they describe what must not happen.
    """
    lives = Lives(folded)
    for row in rows:
        if row.index is not None and row.attempt is not None:
            lives.apply(row.index, row.attempt, row.event)
    return lives


def epoch_bases(rows: Iterable[EventRow]) -> dict[int, int]:
    """epoch -> the step from which it went on."""
    return {row.version.epoch: row.version.step for row in rows if row.event is Event.EPOCH}


def audit_rows(rows: Iterable[EventRow], max_staleness: int, folded: Totals | None = None) -> dict[str, Any]:
    """Whether every admitted prompt ended once or is outstanding, and no batch took a token that is too old.

    Returns:
        `admitted`, `outstanding`, `ended` (by `trained` and `evicted`), `evicted` and `retried` (by reason),
        `lost` (indices that were passed over), `doubled` (prompts trained on twice), `violations`: what is
        not as promised, in words.
    """
    kept = surviving(rows)
    folded = folded or Totals()
    lives, bases = Lives(folded), epoch_bases(kept)
    evicted, retried = Counter(folded.evicted), Counter(folded.retried)
    trained: Counter[int] = Counter()
    violations: list[str] = []
    for row in kept:
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
        if row.event is Event.TRAINED:
            trained[row.index] += 1
        if row.event is Event.CUT:
            oldest = Version.parse(row.detail["oldest"])
            age = row.version.step - oldest.step
            if not descends(oldest, row.version, bases) or age > max_staleness:
                violations.append(f"row {row.seq}: {row.key} of version {oldest} is cut at {row.version}")
    lost = lives.newest + 1 - lives.admitted
    if lost:
        violations.append(f"{lost} prompts up to {lives.newest} were never admitted")
    if lives.admitted != len(lives.live) + sum(lives.ended.values()):
        violations.append(f"{lives.admitted} admitted, {len(lives.live)} live, {dict(lives.ended)} ended")
    return {
        "admitted": lives.admitted,
        "outstanding": len(lives.live),
        "ended": dict(lives.ended),
        "evicted": dict(evicted),
        "retried": dict(retried),
        "lost": lost,
        "doubled": sum(count > 1 for count in trained.values()),
        "violations": violations,
    }
