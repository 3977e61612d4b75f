"""Finds the processes that a test's run has left behind, also those whose parents have died."""

from __future__ import annotations

import time

import psutil

from caprl_async import processes

processes.adopt_orphans()  # what a dead run leaves behind becomes a child of this process


def left_running(before: list[psutil.Process], patience_s: float = 30.0) -> list[str]:
    """Titles of what this process has started since `before` (its `processes.descendants()`) and still runs.

    What is just ending gets `patience_s` to do so.
    """
    deadline = time.monotonic() + patience_s
    while True:
        processes.bury_orphans(own=0)
        found = processes.descendants(spare=before)
        if not found or time.monotonic() > deadline:
            return processes.titles(found)
        time.sleep(0.2)
