"""The batches that a run's parameters are made of: those of the steps that no rollback has voided, in order.

A rollback brings back parameters, optimizer and random state as they were after some step. So whoever trains
on the line's batches from the start comes to where the run is, as if what was rolled back had never been.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from caprl_async.replay.events import Event, EventRow, LedgerError, surviving
from caprl_async.types import TrainBatch, Version


@dataclass(frozen=True)
class Group:
    """One group of a batch, as the ledger has it."""

    key: str
    attempt: int
    ready: int | None  # seq of its `ready` row
    advantages: tuple[float, ...] = ()  # as the learner told them; empty if it did not


@dataclass(frozen=True)
class LineStep:
    """One learner step: on the batch cut at `version`."""

    version: Version
    groups: tuple[Group, ...] = field(default=())  # in the batch's order; empty if their rows are folded

    @property
    def number(self) -> int:
        """Of the step, from 1: parameters after it are those of step `number`."""
        return self.version.step + 1


def surviving_line(rows: Iterable[EventRow]) -> list[LineStep]:
    """Every step of the line, in order; the first is not step 1 if the run went on from another run's.

    Raises:
        LedgerError: a step is missing in between.
    """
    ready: dict[str, int] = {}
    cut: dict[Version, dict[str, EventRow]] = {}
    told: dict[tuple[Version, str], tuple[float, ...]] = {}
    made: list[Version] = []
    for row in surviving(rows):
        if row.event is Event.READY:
            ready[row.key] = row.seq
        elif row.event is Event.CUT:
            cut.setdefault(row.version, {})[row.key] = row
        elif row.event is Event.TRAINED:
            told[row.version, row.key] = tuple(row.detail.get("advantages", ()))
        elif row.event is Event.STEP:
            made.append(Version(row.version.epoch, row.version.step - 1))
    for before, after in pairwise(made):
        if after.step != before.step + 1:
            raise LedgerError(f"the ledger goes from step {before.step + 1} to step {after.step + 1}")
    return [
        LineStep(
            version,
            tuple(
                Group(key, row.attempt or 0, ready.get(key), told.get((version, key), ()))
                for key, row in cut.get(version, {}).items()
            ),
        )
        for version in made
    ]


def contradictions(step: LineStep, batch: TrainBatch) -> list[str]:
    """What of a recorded batch is not as the ledger says, in words."""
    if batch.version != step.version:
        return [f"it is the batch of version {batch.version}"]
    if not step.groups:
        return []
    has = [f"{scored.group.key}@{scored.group.attempt}" for scored in batch.groups]
    wanted = [f"{group.key}@{group.attempt}" for group in step.groups]
    if has == wanted:
        return []
    strange, missing = _without(has, wanted), _without(wanted, has)
    found = [f"the ledger has no {', '.join(strange)} in it"] if strange else []
    found += [f"it lacks {', '.join(missing)}"] if missing else []
    return found or ["its groups are in another order"]


def _without(some: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in some if name not in known]
