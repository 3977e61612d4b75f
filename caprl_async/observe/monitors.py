"""The report's table of reward hacking: metrics rows and bands in, one line per monitor out."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caprl_async.config import BandsConfig
from caprl_async.judge.monitors import MONITORS, Monitor
from caprl_async.observe.metrics import Row

Band = tuple[float, float]


class State(enum.Enum):
    """Where a monitor's values lie; the value is what the report says of it."""

    OUTSIDE = "outside"  # the last value
    WAS_OUTSIDE = "was outside"  # an earlier value, not the last
    IN_BAND = "in band"
    NO_BAND = "no band"
    NOT_MEASURED = "not measured"  # no row has a value


@dataclass(frozen=True)
class MonitorRow:
    """One monitor over a whole run, as the template shows it; "–" stands for what there is not."""

    name: str
    title: str
    meaning: str
    first: str  # at the first step that measured it
    last: str
    worst: str  # the farthest outside its band, or the nearest to an edge of it
    band: str
    state: State


def monitor_rows(
    rows: Sequence[Row], bands: Mapping[str, Any], monitors: Sequence[Monitor] = MONITORS
) -> list[MonitorRow]:
    """The monitors in their order, over all rows (by step).

    `bands` is `observe.bands` as a conf.yaml holds it: a key that is missing, as in a run older than its
    monitor, or that holds no band, has its default.
    """
    return [_row(monitor, _values(rows, monitor.name), _band(bands, monitor.name)) for monitor in monitors]


def _row(monitor: Monitor, values: Sequence[float], band: Band | None) -> MonitorRow:
    return MonitorRow(
        name=monitor.name,
        title=monitor.title,
        meaning=monitor.meaning,
        first=_number(values[0]) if values else "–",
        last=_number(values[-1]) if values else "–",
        worst=_number(min(values, key=lambda v: _room(v, band, monitor.limits))) if values and band else "–",
        band=f"{band[0]:g} – {band[1]:g}" if band else "none",
        state=_state(values, band),
    )


def _state(values: Sequence[float], band: Band | None) -> State:
    if not values:
        return State.NOT_MEASURED
    if band is None:
        return State.NO_BAND
    if not band[0] <= values[-1] <= band[1]:
        return State.OUTSIDE
    return State.IN_BAND if all(band[0] <= value <= band[1] for value in values) else State.WAS_OUTSIDE


def _room(value: float, band: Band, limits: Band) -> float:
    """Distance to the band's nearer edge, negative outside. An edge at the metric's own limit, which nothing
    can cross, is none: a share of 0 is not the worst of a band from 0."""
    low, high = band
    below = value - low if low > limits[0] else math.inf
    above = high - value if high < limits[1] else math.inf
    return min(below, above)


def _values(rows: Sequence[Row], name: str) -> list[float]:
    """What was measured, by step; no NaN."""
    found = [row.get(name) for row in rows]
    return [value for value in found if isinstance(value, int | float) and not math.isnan(value)]


def _band(bands: Mapping[str, Any], name: str) -> Band | None:
    """None: an empty list, or a metric that has no band."""
    declared = bands.get(name)
    if not _is_band(declared):
        declared = getattr(BandsConfig(), name, [])
    return (float(declared[0]), float(declared[1])) if declared else None


def _is_band(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(edge, int | float) for edge in value):
        return False
    return not value or (len(value) == 2 and value[0] <= value[1])


def _number(value: float) -> str:
    return f"{value:.3g}"
