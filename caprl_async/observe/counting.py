"""The terminal while a job goes through rows: how many are done and failed, how fast, and the time left.

A terminal gets a bar; a file or a pipe gets plain lines, at most one every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from caprl_async.observe.progress import duration


class Counting:
    """`with Counting("captions", total, console) as counting: counting.count(rows, failed)`."""

    def __init__(
        self,
        what: str,
        total: int | None,
        console: Console,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` is None where it is not known."""
        self.done = self.failed = 0
        self._what = what
        self._total = total
        self._console = console
        self._every_s = every_s
        self._clock = clock
        self._began = self._printed = clock()
        self._first: tuple[float, int] | None = None  # when the first rows came out, and how many
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[more]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, more="")

    def __enter__(self) -> Counting:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def count(self, done: int, failed: int) -> None:
        """So many rows more are through; `failed` in all have no result."""
        self.done += done
        self.failed = failed
        self._bar.update(self._task, advance=done, more=self._more())
        now = self._clock()
        self._first = self._first or (now, done)
        if not self._console.is_terminal and now - self._printed >= self._every_s:
            self._printed = now
            self._console.print(self.line(), highlight=False, markup=False, soft_wrap=True)

    def line(self) -> str:
        """`captions 300 of 1000 | 2 failed | 12.3/s | 57 s left`."""
        of = f" of {self._total}" if self._total is not None else ""
        return " | ".join(
            part for part in (f"{self._what} {self.done}{of}", self._more(), self._left()) if part
        )

    def per_second(self) -> float:
        """Since the first rows came out, without those: before that models were loaded."""
        since, before = self._first if self._first and self._timed() else (self._began, 0)
        return (self.done - before) / max(self._clock() - since, 1e-9)

    def _more(self) -> str:
        failed = f"{self.failed} failed" if self.failed else ""
        rate = f"{self.per_second():.1f}/s" if self._timed() else ""
        return " | ".join(filter(None, (failed, rate)))

    def _timed(self) -> bool:
        """Whether rows have come out since the first ones, so that there is a rate."""
        return self._first is not None and self.done > self._first[1]

    def _left(self) -> str:
        if self._total is None or not self._timed():
            return ""
        return f"{duration((self._total - self.done) / self.per_second())} left"
