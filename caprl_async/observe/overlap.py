"""How much of the training happened while later batches were being generated: the proof of asynchrony.

Reads the times that the hub's ledger holds; `caprl_async/replay/ledger.py` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from caprl_async.replay.events import Event, EventRow, surviving
from caprl_async.replay.ledger import read_rows

Span = tuple[int, float, float]
"""(learner step, started, finished); the step is the one that trains, or that the group is trained in."""


def overlap_share(steps: Sequence[Span], groups: Sequence[Span]) -> float:
    """Share of learner steps during which a group was generated that a *later* step trains on, 0..1.

    Args:
        steps: (the step's number, started, finished) of every learner step, seconds of one clock.
        groups: (number of the step that trained on the group, generation started, finished).

    Every step counts, also the last, which has no later step to generate for. Without steps it is 0.
    """
    if not steps:
        return 0.0
    trained_in = np.array([group[0] for group in groups], dtype=np.int64)
    started = np.array([group[1] for group in groups], dtype=np.float64)
    finished = np.array([group[2] for group in groups], dtype=np.float64)
    overlapped = [
        bool(np.any((trained_in > step) & (started < end) & (finished > begin))) for step, begin, end in steps
    ]
    return sum(overlapped) / len(overlapped)


def overlap_from_ledger(path: Path) -> float:
    """`overlap_share` of the steps that a run's ledger.sqlite holds and no rollback has voided.

    Raises:
        FileNotFoundError: there is no ledger.
    """
    return overlap_share(*spans(read_rows(path)))


def spans(rows: Iterable[EventRow]) -> tuple[list[Span], list[Span]]:
    """The steps, and the groups that were trained on, from a ledger's rows; not the steps whose groups' rows
    are no longer kept.
    """
    steps: list[Span] = []
    groups: list[Span] = []
    generated: dict[str, tuple[float, float]] = {}  # of the newest attempt
    for row in surviving(rows):
        if row.event is Event.STEP:
            steps.append((row.version.step, row.detail["started"], row.detail["finished"]))
        elif row.event is Event.JUDGING:
            generated[row.key] = (row.detail["started"], row.detail["finished"])
        elif row.event is Event.TRAINED:
            # A batch is named by the version it starts from, a step by the version it makes.
            groups.append((row.version.step + 1, *generated[row.key]))
    first = min((step for step, _, _ in groups), default=0)
    return [step for step in steps if step[0] >= first], groups
