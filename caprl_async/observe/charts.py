"""The report's curves: metrics rows in, small inline SVGs out, in colours that the page's theme sets."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from caprl_async.observe import names
from caprl_async.observe.metrics import Row
from caprl_async.replay.metrics import SHOWN_AGES

# Matplotlib draws in these; in the SVG they become CSS variables, so that one drawing fits light and dark.
INK, GRID, BACK = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_CSS = {INK: "var(--muted)", GRID: "var(--grid)", BACK: "var(--card)"} | {
    c: f"var(--series-{i})" for i, c in enumerate(SERIES)
}


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    metric: str  # a metric's name, or idle:STAGE


@dataclass(frozen=True)
class Chart:
    """One small chart; lines that no row has are left out, and a chart without lines too."""

    title: str
    note: str  # what one looks for
    lines: tuple[Line, ...]
    percent: bool = False
    log: bool = False


CHARTS = (
    Chart("Reward", "mean over the batch's captions", (Line("reward", names.REWARD),)),
    Chart("QA accuracy", "of the judge, on training images", (Line("judge", names.ACCURACY),), percent=True),
    Chart(
        "QA accuracy, held out",
        "of each judge, on held-out images",
        (Line("judge", "eval_judge"), Line("held-out judge", "eval_heldout_judge")),
        percent=True,
    ),
    Chart(
        "Held out",
        "accuracy on held-out images during training, and on training images",
        (
            Line("judge", "heldout_score"),
            Line("held-out judge", "heldout_judge_score"),
            Line("training", names.ACCURACY),
        ),
        percent=True,
    ),
    Chart(
        "Loss",
        "of the policy; in supervised training the negative log-likelihood per token",
        (Line("training", "loss"), Line("validation", "validation_loss")),
    ),
    Chart("Caption length", "tokens", (Line("mean", names.LENGTH),)),
    Chart(
        "Staleness",
        "learner steps between a token and the batch it trains",
        (Line("mean", names.STALENESS), Line("oldest token", names.STALENESS_MAX)),
    ),
    Chart(
        "Log-probability mismatch",
        "|engine − learner| per token; fresh: tokens of the learner's own version",
        (
            Line("mean", names.LOGPROB_GAP),
            Line("99th percentile", "logprob_gap_p99"),
            Line("largest", "logprob_gap_max"),
            Line("fresh tokens, mean", names.LOGPROB_GAP_FRESH),
        ),
        log=True,
    ),
    Chart(
        "Idle share",
        "of each stage's time",
        tuple(Line(stage, f"idle:{stage}") for stage in names.STAGES),
        percent=True,
    ),
    Chart(
        "Queue depth",
        "groups in the hub, by where they are",
        tuple(Line(label, name) for label, name in names.QUEUE.items()),
    ),
    Chart("Throughput", "captions per second", (Line("captions/s", names.CAPTIONS_PER_S),)),
    Chart(
        "Seconds per step",
        "waiting for the batch, training, sending the weights",
        (Line("wait", names.WAIT_S), Line("train", names.STEP_S), Line("weight sync", names.SYNC_S)),
    ),
    Chart("Entropy", "nats per token; a fall to 0 is a collapse", (Line("policy", "entropy"),)),
    Chart("Gradient norm", "before clipping", (Line("norm", "grad_norm"),)),
    Chart(
        "Staleness, shares",
        "of the batch's tokens, by learner steps",
        (
            *(Line(str(age), f"staleness_share_{age}") for age in range(SHOWN_AGES)),
            Line(f"{SHOWN_AGES} or more", "staleness_share_older"),
        ),
        percent=True,
    ),
    Chart(
        "Importance weights",
        "proximal / behaviour; 1 is on policy",
        (
            Line("mean", "importance_mean"),
            Line("largest", "importance_max"),
            Line("least", "importance_min"),
            Line("largest, before its bounds", "importance_raw_max"),
        ),
    ),
    Chart(
        "Effective samples",
        "share of the tokens that carry the update, and of those held by a bound or the trust region",
        (
            Line("effective", "effective_samples"),
            Line("effective, uncorrected", "effective_samples_raw"),
            Line("bounded", "importance_bounded"),
            Line("clipped", "clip_fraction"),
        ),
        percent=True,
    ),
    Chart(
        "KL",
        "nats per token: from the sampling policy, and to the start where learner.kl is on",
        (Line("sampling policy", "kl_behaviour"), Line("start", "kl")),
    ),
)

HACKING_CHARTS = (
    Chart(
        "Reward hacking",
        "share of captions, or of their 4-grams, by the monitors below",
        (
            Line("answer leak", "hack_answer_leak"),
            Line("question echo", "hack_question_echo"),
            Line("talk about itself", "hack_meta"),
            Line("repetition", "hack_repetition"),
        ),
        percent=True,
    ),
)
"""Shown beside the table of monitors."""


@dataclass(frozen=True)
class Drawn:
    """A chart as the template shows it."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[int, str, str], ...]  # (colour, label, last value)


def draw_all(rows: Sequence[Row], charts: Sequence[Chart] = CHARTS) -> list[Drawn]:
    """The charts that the rows have values for."""
    drawn = [_draw(chart, rows) for chart in charts]
    return [chart for chart in drawn if chart is not None]


def series(rows: Sequence[Row], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, without the steps that lack it."""
    points = []
    for row in rows:
        stage = metric.partition(":")[2]
        value = names.idle(row, stage) if stage else row.get(metric)
        if value is not None:
            points.append((row["step"], value))
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the run, shorter at both ends."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _draw(chart: Chart, rows: Sequence[Row]) -> Drawn | None:
    curves = [(line, *series(rows, line.metric)) for line in chart.lines]
    curves = [(line, x, y) for line, x, y in curves if len(x)]
    if not curves:
        return None
    # The salt keeps the ids of one page's SVGs apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9}):
        figure = Figure(figsize=(3.7, 2.0), layout="constrained")
        axes = figure.add_subplot()
        for i, (_, x, y) in enumerate(curves):
            color = SERIES[i % len(SERIES)]
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
            axes.plot(
                x, smooth(y), color=color, linewidth=1.8, marker="o" if len(x) < 10 else "", markersize=4
            )
        if chart.log and all((y > 0).all() for _, _, y in curves):
            axes.set_yscale("log")
        elif chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step", color=INK)
        axes.tick_params(which="both", color=GRID, labelcolor=INK, length=0)
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.spines[:].set_visible(False)
        picture = svg(figure, f"{chart.title} by step")
    legend = tuple((i, line.label, _number(float(y[-1]), chart)) for i, (line, _, y) in enumerate(curves))
    return Drawn(chart.title, chart.note, picture, legend)


def svg(figure: Figure, label: str) -> str:
    """A drawing in the sentinel colours as inline SVG in those of the page; `label` is read to the blind."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # The figure's own white backgrounds would hide a dark page.
    text = re.sub(r'<g id="patch_[12]">.*?</g>', "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for sentinel, css in _CSS.items():
        text = text.replace(sentinel, css)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _number(value: float, chart: Chart) -> str:
    if chart.percent:
        return f"{100 * value:.0f} %"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:.2e}" if math.isfinite(value) else "–"
