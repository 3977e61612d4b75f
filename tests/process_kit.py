"""Finds the processes that a test's run started, by a mark in their environment that all of them inherit."""

from __future__ import annotations

import time

import psutil

MARK = "CAPRL_TEST_RUN"


def marked(value: str) -> list[str]:
    """Command lines of live processes that carry `MARK=value`, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != psutil.Process().pid and process.environ().get(MARK) == value
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()[:4]))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or not ours
    return found


def left_running(value: str, patience_s: float = 30.0) -> list[str]:
    """The same, but processes that are just ending get `patience_s` to do so."""
    deadline = time.monotonic() + patience_s
    while (found := marked(value)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
