"""Who did what when, and how long each part of a group's life took: from the rows of a run's ledger."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from caprl_async.replay.events import Event, EventRow, surviving

LEARNER, JUDGES = "learner", "judges"
STAGES = ("captioned", "judged", "waited for its batch", "trained", "whole")


@dataclass(frozen=True)
class Bar:
    """One piece of work; times are seconds since 1970. `step`: the learner step that trains on it."""

    who: str
    started: float
    finished: float
    step: int | None


@dataclass(frozen=True)
class Schedule:
    """All bars of a run, in the order of their starts, and the seconds of each trained group's stages."""

    bars: Sequence[Bar]
    latencies: Mapping[str, Sequence[float]]  # by one of STAGES

    def window(self, steps: int) -> tuple[float, float] | None:
        """From start to end of so many learner steps in the middle of the run; None: there is none."""
        learner = [bar for bar in self.bars if bar.who == LEARNER]
        if not learner:
            return None
        first = max(0, (len(learner) - steps) // 2)
        chosen = learner[first : first + steps]
        return chosen[0].started, chosen[-1].finished


@dataclass
class _Group:
    """What is known of one prompt's newest attempt."""

    peer: str
    started: float
    finished: float
    scored: float | None = None
    cut: float | None = None


def schedule(rows: Iterable[EventRow]) -> Schedule:
    """Reads the rows that no rollback has voided. A group's verdicts begin when its captions end: the bar
    holds the wait for a judge too."""
    bars: list[Bar] = []
    latencies: dict[str, list[float]] = {stage: [] for stage in STAGES}
    groups: dict[str, _Group] = {}
    ends: dict[int, float] = {}  # of learner steps
    trained: list[tuple[int, _Group]] = []
    for row in surviving(rows):
        group = groups.get(row.key)
        match row.event:
            case Event.STEP:
                started, finished = row.detail["started"], row.detail["finished"]
                ends[row.version.step] = finished
                bars.append(Bar(LEARNER, started, finished, row.version.step))
            case Event.JUDGING:
                detail = row.detail
                groups[row.key] = _Group(detail["peer"], detail["started"], detail["finished"])
            case Event.READY if group is not None:
                group.scored = row.time
            case Event.CUT if group is not None:
                group.cut = row.detail["at"]
            case Event.TRAINED if group is not None:
                # A batch is named by the version it starts from, a step by the version it makes.
                trained.append((row.version.step + 1, groups.pop(row.key)))
            case Event.RETRIED | Event.EVICTED if group is not None:
                bars += _bars(groups.pop(row.key), row.time, None)
    for step, group in trained:
        bars += _bars(group, group.scored, step)
        for stage, seconds in _seconds(group, ends.get(step)).items():
            latencies[stage].append(seconds)
    return Schedule(sorted(bars, key=lambda bar: bar.started), latencies)


def _bars(group: _Group, scored: float | None, step: int | None) -> list[Bar]:
    found = [Bar(group.peer, group.started, group.finished, step)]
    if scored is not None:
        found.append(Bar(JUDGES, group.finished, scored, step))
    return found


def _seconds(group: _Group, ended: float | None) -> dict[str, float]:
    if group.scored is None or group.cut is None or ended is None:
        return {}
    moments = (group.started, group.finished, group.scored, group.cut, ended)
    parts = [max(0.0, after - before) for before, after in itertools.pairwise(moments)]
    return dict(zip(STAGES, [*parts, ended - group.started], strict=True))


def lanes(bars: Sequence[Bar]) -> list[int]:
    """A lane for each bar (ordered by start), so that no two bars of one lane overlap; as few as can be."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []  # end, lane
    found = []
    used = 0
    for bar in bars:
        while busy and busy[0][0] <= bar.started:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, used = used, used + 1
        heapq.heappush(busy, (bar.finished, lane))
        found.append(lane)
    return found


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95th and 99th percentile of at least one value."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]
