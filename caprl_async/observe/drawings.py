"""The report's pictures of the asynchronous schedule: who worked on what, how long, how stale tokens were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from caprl_async.observe.charts import BACK, GRID, INK, SERIES, Drawn, svg
from caprl_async.observe.metrics import Row
from caprl_async.observe.schedule import JUDGES, LEARNER, STAGES, Bar, Schedule, lanes, percentiles
from caprl_async.replay.metrics import SHOWN_AGES

_STEPS = 6  # of the learner, shown
_MOST_LANES = 16  # of one actor; more are drawn over each other
_BINS = 30


def gantt(schedule: Schedule) -> str:
    """A window in the middle of the run as SVG: a row for each actor, a colour for each learner step and for
    what it trains on. Empty if there were no steps."""
    window = schedule.window(_STEPS)
    if window is None:
        return ""
    start, end = window
    bars = [bar for bar in schedule.bars if bar.finished >= start and bar.started <= end]
    rows = _by_actor(bars)
    with _style("schedule"):
        heights = {who: max(2, min(_MOST_LANES, 1 + max(lanes(own)))) for who, own in rows.items()}
        figure = Figure(
            figsize=(9.5, 0.8 + 0.085 * sum(heights.values()) + 0.1 * len(rows)), layout="constrained"
        )
        axes = figure.add_subplot()
        top, ticks = 0.0, []
        for who, own in rows.items():
            height = heights[who]
            _draw_bars(axes, own, start, top, height)
            ticks.append(top + height / 2)
            top += height + 1.2
        axes.set_yticks(ticks, list(rows))
        axes.set_xlim(0, end - start)
        axes.set_ylim(top - 0.6, -0.6)
        axes.set_xlabel("seconds", color=INK)
        _bare(axes)
        axes.grid(True, axis="x", color=GRID, linewidth=0.6)
        return svg(figure, "who worked on what, by time")


def _by_actor(bars: Sequence[Bar]) -> Mapping[str, list[Bar]]:
    found: dict[str, list[Bar]] = {}
    for bar in bars:
        found.setdefault(bar.who, []).append(bar)
    order = {JUDGES: 1, LEARNER: 2}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], 0), item[0])))


def _draw_bars(axes: Axes, bars: Sequence[Bar], start: float, top: float, height: int) -> None:
    used = lanes(bars)
    thick = height / min(_MOST_LANES, 1 + max(used))
    for bar, lane in zip(bars, used, strict=True):
        y = top + (lane % _MOST_LANES) * thick
        color = GRID if bar.step is None else SERIES[bar.step % len(SERIES)]
        wide = bar.finished - bar.started
        axes.broken_barh([(bar.started - start, wide)], (y, 0.85 * thick), facecolors=color, linewidth=0)
        if bar.who == LEARNER:
            middle = bar.started - start + wide / 2
            axes.text(middle, y + 0.42 * thick, str(bar.step), color=BACK, ha="center", va="center")


def latencies(schedule: Schedule) -> list[Drawn]:
    """A histogram for each stage of a trained group's life."""
    notes = {
        "captioned": "seconds in which a rollout wrote a group's captions",
        "judged": "seconds from its captions to its verdicts, the wait for a judge included",
        "waited for its batch": "seconds from its verdicts to the cut",
        "trained": "seconds from the cut to the end of the step",
        "whole": "seconds from its first token to the end of the step",
    }
    return [
        _histogram(f"Latency: {stage}", notes[stage], schedule.latencies[stage])
        for stage in STAGES
        if schedule.latencies[stage]
    ]


def _histogram(title: str, note: str, values: Sequence[float]) -> Drawn:
    middle, p95, p99 = percentiles(values)
    counts, edges = np.histogram(values, bins=_BINS)
    with _style(title):
        figure = Figure(figsize=(3.7, 1.7), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=SERIES[0])
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds", color=INK)
        _bare(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        picture = svg(figure, title)
    legend = ((0, "median", f"{middle:.2f} s"), (0, "95 %", f"{p95:.2f} s"), (0, "99 %", f"{p99:.2f} s"))
    return Drawn(title, note, picture, legend)


def staleness(rows: Sequence[Row]) -> Drawn | None:
    """Share of all trained tokens by their age in learner steps, over the whole run."""
    ages = [*(str(age) for age in range(SHOWN_AGES)), "older"]
    shares = []
    for age in ages:
        known = [value for row in rows if (value := row.get(f"staleness_share_{age}")) is not None]
        shares.append(sum(known) / len(known) if known else 0.0)
    if not any(shares):
        return None
    title = "Staleness"
    with _style(title):
        figure = Figure(figsize=(3.7, 1.7), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(ages, shares, color=SERIES[0])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("learner steps", color=INK)
        _bare(axes)
        picture = svg(figure, title)
    mean = sum(age * share for age, share in enumerate(shares))
    note = "share of the tokens, by age when their batch was cut"
    return Drawn("Staleness, whole run", note, picture, ((0, "mean", f"{mean:.2f}"),))


def _style(salt: str) -> AbstractContextManager[None]:
    return rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9})


def _bare(axes: Axes) -> None:
    axes.tick_params(which="both", color=GRID, labelcolor=INK, length=0)
    axes.spines[:].set_visible(False)
