"""Writes a run's report.html; while the run goes on, again and again until it ends."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.observe.report import write_report

_AGAIN_S = 20.0


def run(config: Config) -> None:
    """Reads only, but for the report itself; Ctrl-C ends it, not the run."""
    folder = Path(config.run)
    console = Console()
    going_on = True
    while going_on:
        going_on = conf.is_going_on(folder)
        path = write_report(folder, going_on=going_on)
        console.print(f"report: {path}", markup=False, soft_wrap=True)
        if going_on:
            time.sleep(_AGAIN_S)
