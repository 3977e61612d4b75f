"""The terminal while a run is on: where it stands, how well it learns, which stage waits.

A terminal gets a live panel; a file or a pipe gets plain lines, at most one every few seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from caprl_async.observe import names

_RECENT = 20  # steps that the speed, and so the time left, is taken from


class Progress:
    """`with Progress(steps, console) as progress: progress.show(step, metrics)` after every step.

    Metrics are the flat dict of a step, with the names of names.py; what is missing is left out.
    """

    def __init__(
        self,
        steps: int,
        console: Console | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self.console = console or Console(stderr=True)
        self._every_s = every_s
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=_RECENT + 1)
        self._began = clock()
        self._printed: float | None = None
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(
                console=self.console, get_renderable=self._panel, refresh_per_second=2, transient=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are those of the last."""
        now = self._clock()
        if not self._times:
            self._times.append((step - 1, self._began))  # a resumed run does not begin at 0
        self._times.append((step, now))
        self._step, self._metrics = step, dict(metrics)
        if self._live is not None:
            self._live.refresh()
            return
        due = self._printed is None or now - self._printed >= self._every_s
        if due or step >= self.steps:
            self._printed = now
            line = plain_line(step, self.steps, self._metrics, self.seconds_left())
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """By the speed of the last steps; None before the first."""
        if len(self._times) < 2:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return max(0.0, (self.steps - last) * (ended - began) / (last - first))

    def _panel(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        left = self.seconds_left()
        head.add_row(
            Text(f"step {self._step} of {self.steps}", style="bold"),
            ProgressBar(total=max(1, self.steps), completed=self._step, width=40),
            Text(f"{duration(left)} left" if left is not None else "first batch is being collected"),
        )
        grid = Table.grid(padding=(0, 3))
        pairs = [
            Text.assemble((label, "dim"), " ", (value, "bold")) for label, value in readings(self._metrics)
        ]
        for i in range(0, len(pairs), 4):
            grid.add_row(*pairs[i : i + 4])
        return Group(head, grid)


def readings(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, value) pairs that a person follows, of the metrics that are there."""
    found = []
    if names.REWARD not in metrics and "loss" in metrics:  # of supervised training it is what one follows
        found.append(("loss", f"{metrics['loss']:.3f}"))
    for label, name, form in (
        ("validation loss", "validation_loss", "{:.3f}"),
        ("reward", names.REWARD, "{:.3f}"),
        ("QA accuracy", names.ACCURACY, "{:.1%}"),
        ("captions/s", names.CAPTIONS_PER_S, "{:.1f}"),
        ("tokens/caption", names.LENGTH, "{:.1f}"),
        ("staleness", names.STALENESS, "{:.2f}"),
    ):
        if (value := metrics.get(name)) is not None:
            found.append((label, form.format(value)))
    depths = [(label, metrics.get(name)) for label, name in names.QUEUE.items()]
    queue = ", ".join(f"{depth:.0f} {label}" for label, depth in depths if depth is not None)
    idle = [(stage, names.idle(metrics, stage)) for stage in names.STAGES]
    shown = ", ".join(f"{stage} {share:.0%}" for stage, share in idle if share is not None)
    return found + [(label, text) for label, text in (("queue", queue), ("idle", shown)) if text]


def plain_line(step: int, steps: int, metrics: Mapping[str, float], left: float | None) -> str:
    """One line for a file: `step 3 of 60 | reward 0.412 | ... | 1 min 20 s left`."""
    parts = [f"step {step} of {steps}", *(f"{label} {value}" for label, value in readings(metrics))]
    if left is not None:
        parts.append(f"{duration(left)} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
