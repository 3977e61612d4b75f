"""The training queue across a checkpoint, and across the death of the process that holds it.

A checkpoint goes back to a point between two learner steps and begins a new epoch. A hub that was killed goes
on in the same epoch from its ledger, whose rows, journal and note are always of one moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from caprl_async.replay.events import Event, EventRow, LedgerError, epoch_bases, surviving
from caprl_async.replay.flow import TrainFlow
from caprl_async.replay.ledger import Ledger
from caprl_async.replay.lives import Cut, Life, Prepared
from caprl_async.replay.queue import Kept, Queue, make_cut
from caprl_async.replay.transport import encode
from caprl_async.replay.work import GenerateWork
from caprl_async.reward.allocation import Spreads
from caprl_async.types import Evicted, Retried, Struct, TrainBatch, Version

QUEUE = "queue.msgpack"
"""Name of a checkpoint's file with the queue in it."""

_NOTE = "flow"


class Counts(Struct, frozen=True):
    """What the queue has counted since the run began."""

    captions_sampled: int = 0
    captions_trained: int = 0
    staleness: dict[int, int] = msgspec.field(default_factory=dict)  # tokens of all batches, by age in steps
    evicted: dict[str, int] = msgspec.field(default_factory=dict)
    retried: dict[str, int] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, flow: TrainFlow) -> Counts:
        return cls(
            captions_sampled=flow.captions_sampled,
            captions_trained=flow.captions_trained,
            staleness=dict(flow.staleness),
            evicted=dict(flow.evicted),
            retried=dict(flow.retried),
        )

    def give(self, flow: TrainFlow) -> None:
        flow.captions_sampled, flow.captions_trained = self.captions_sampled, self.captions_trained
        flow.staleness = Counter(self.staleness)
        flow.evicted, flow.retried = Counter(self.evicted), Counter(self.retried)


# ---------------------------------------------------------------- checkpoints


class Saved(Struct, frozen=True):
    """A checkpoint's queue, cut between two learner steps."""

    version: Version = Version(0, 0)
    cursor: int = 0
    # index -> attempt of every prompt on its way
    outstanding: dict[int, int] = msgspec.field(default_factory=dict)
    # of those that have captions: an encoded Kept
    kept: dict[int, msgspec.Raw] = msgspec.field(default_factory=dict)
    counts: Counts = Counts()
    spreads: tuple[tuple[str, float], ...] = ()
    ledger: str = ""  # identity of the ledger that `position` is a row of
    position: int = 0
    probe: dict[str, Any] | None = None  # the examiner's

    def captions(self, index: int) -> Kept | None:
        """What is kept of a prompt; None if it had no captions yet.

        Raises:
            LedgerError: it is damaged.
        """
        if index not in self.kept:
            return None
        try:
            return msgspec.msgpack.decode(self.kept[index], type=Kept)
        except msgspec.MsgspecError as error:
            raise LedgerError(f"captions of prompt {index} in the checkpoint: {error}") from error

    def write(self, folder: Path) -> None:
        (folder / QUEUE).write_bytes(encode(self))


def read_saved(folder: Path) -> Saved:
    """What `Saved.write` wrote.

    Raises:
        LedgerError: the file is missing or damaged.
    """
    path = folder / QUEUE
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Saved)
    except (OSError, msgspec.MsgspecError) as error:
        raise LedgerError(f"{path} cannot be read: {error}") from error


def save(flow: TrainFlow) -> Saved:
    """The queue at the trained frontier; call it between two learner steps."""
    queue = flow.queue
    flow.ledger.sync()
    return Saved(
        version=queue.version,
        cursor=queue.cursor,
        outstanding={index: life.prompt.attempt for index, life in queue.lives.items()},
        kept={_index(key): msgspec.Raw(data) for key, (_, _, data) in flow.ledger.journalled().items()},
        counts=Counts.of(flow),
        spreads=tuple(flow.spreads.state()) if flow.spreads is not None else (),
        ledger=flow.ledger.identity,
        position=flow.ledger.position,
    )


def restore(flow: TrainFlow, saved: Saved, version: Version, again: Sequence[Prepared]) -> None:
    """Goes back to `saved`; `version` begins a new epoch.

    Args:
        again: the outstanding rows, prepared.

    Raises:
        LedgerError: the ledger is this run's but does not hold what `saved` says.
    """
    ledger = flow.ledger
    own = saved.ledger == ledger.identity
    if own:
        ledger.roll_back(saved.position, version)
        if {index: attempt for index, (_, attempt) in ledger.lives.live.items()} != saved.outstanding:
            raise LedgerError(f"{ledger.path} and the checkpoint disagree on what was on its way")
    else:
        oldest = min(saved.outstanding, default=saved.cursor)
        ledger.begin_elsewhere(saved.cursor - len(saved.outstanding), oldest - 1, version)
    bases = epoch_bases(ledger.rows())
    flow.reset(Queue(version, saved.cursor, version.step, bases=bases))
    saved.counts.give(flow)
    if flow.spreads is not None:
        flow.spreads = Spreads(saved.spreads)
        ledger.keep_spreads(saved.spreads, anew=True)
    for prepared in sorted(again, key=lambda row: row.index):
        _take_back(flow, prepared, saved, own)


def _take_back(flow: TrainFlow, prepared: Prepared, saved: Saved, own: bool) -> None:
    """Puts one prompt where it was, if its captions may still be used; else it is captioned again."""
    index = prepared.index
    life = flow.new_life(prepared, saved.outstanding[index])
    if not own:
        flow.admitted(life)
    state, _ = flow.ledger.lives.live[index]
    kept = saved.captions(index)
    usable = (
        kept is not None
        and state in (Event.JUDGING, Event.READY)
        and flow.fresh(kept.group)
        # The file may be gone, or the frames be others by the keys of this conf.
        and prepared.image is not None
        and prepared.image.sha256 == kept.group.image_sha256
    )
    if kept is None or not usable:
        flow.retry(life, Retried.STALE)
        if prepared.image is None or not life.questions:
            flow.queue.again.remove(life)
            flow.evict(life, Evicted.BAD_ROW if prepared.image is None else Evicted.NOT_ASKED)
        return
    life.group, life.asked = kept.group, kept.asked
    flow.ledger.journal(life.prompt.key, life.prompt.attempt, state.value, bytes(saved.kept[index]))
    if state is Event.JUDGING:
        flow.queue.to_judge.append(life)
    elif kept.scored is not None:
        flow.queue.ready[index] = kept.scored


# ---------------------------------------------------------------- a hub that died


class Note(Struct, frozen=True):
    """What the ledger's rows alone do not say of a queue whose process has died."""

    version: Version
    base: int  # see Queue
    taken: int
    cursor: int
    counts: Counts
    is_open: bool
    finished: bool


def write_note(flow: TrainFlow) -> None:
    """Keeps what `recover` needs, in the transaction of the rows it belongs to."""
    queue = flow.queue
    note = Note(
        version=queue.version,
        base=queue.base,
        taken=queue.taken,
        cursor=queue.cursor,
        counts=Counts.of(flow),
        is_open=flow.is_open,
        finished=flow.finished,
    )
    flow.ledger.write_note(_NOTE, msgspec.to_builtins(note, str_keys=True))


def recover(flow: TrainFlow, again: Sequence[Prepared]) -> list[GenerateWork]:
    """Goes on where the ledger's hub died. `again` are the live rows, prepared.

    Returns:
        What rollouts were captioning then; whoever still does may answer.

    Raises:
        LedgerError: the ledger contradicts itself.
    """
    found = flow.ledger.read_note(_NOTE)
    if found is None:  # it died before it did anything
        return []
    note = msgspec.convert(found, Note, strict=False)
    live = flow.ledger.lives.live
    if flow.spreads is not None:
        flow.spreads = Spreads(flow.ledger.spreads())
    flow.reset(Queue(note.version, note.cursor, note.base, note.taken))
    lives = {row.index: flow.new_life(row, live[row.index][1]) for row in again}
    captioning = _rebuild(flow.queue, flow.ledger, lives)
    note.counts.give(flow)
    flow.is_open, flow.finished = note.is_open, note.finished
    if flow.queue.cut is not None:
        flow.tally.cut(flow.queue.cut.batch, flow.queue.cut.questions)
    return [GenerateWork(flow, life.prompt, None) for life in captioning]


def _rebuild(queue: Queue, ledger: Ledger, lives: Mapping[int, Life]) -> list[Life]:
    """Puts every live prompt where the ledger has it; returns those that were being captioned."""
    rows = surviving(ledger.rows())
    queue.bases = epoch_bases(rows)
    captions = _captions(ledger)
    captioning: list[Life] = []
    for index, (event, attempt) in sorted(ledger.lives.live.items()):
        life = lives[index]
        if event in (Event.ADMITTED, Event.RETRIED):
            queue.again.append(life)
            continue
        if event is Event.GENERATING:
            captioning.append(life)
            continue
        known, kept = captions.get(index, (-1, None))
        if kept is None or known != attempt:
            raise LedgerError(f"{ledger.path}: the captions of prompt {index}, {event.value}, are missing")
        life.group, life.asked = kept.group, kept.asked
        if event is Event.JUDGING:
            queue.to_judge.append(life)
        elif event is Event.READY and kept.scored is not None:
            queue.ready[index] = kept.scored
    queue.cut = _last_cut(rows, ledger, queue, captions)
    return captioning


def _last_cut(
    rows: Sequence[EventRow], ledger: Ledger, queue: Queue, captions: Mapping[int, tuple[int, Kept]]
) -> Cut | None:
    """The batch that was cut and is not known to be trained: the same bytes as before."""
    in_batch = {index for index, (event, _) in ledger.lives.live.items() if event is Event.CUT}
    newest = {row.index: row for row in rows if row.event is Event.CUT and row.index in in_batch}
    cut = sorted(newest.values(), key=lambda row: row.seq)
    groups = [captions[row.index][1].scored for row in cut if row.index is not None]
    if not cut:
        return None
    batch = TrainBatch(
        version=cut[0].version,
        groups=tuple(scored for scored in groups if scored is not None),
        cut=cut[0].detail["at"],
    )
    return make_cut(batch, queue.lives)


def _captions(ledger: Ledger) -> dict[int, tuple[int, Kept]]:
    """index -> (attempt, captions) of every live prompt that has some."""
    return {
        _index(key): (attempt, msgspec.msgpack.decode(data, type=Kept))
        for key, (attempt, _, data) in ledger.journalled().items()
    }


def _index(key: str) -> int:
    return int(key.rpartition("/")[2])
