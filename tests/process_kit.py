"""Finds the processes that a test's run started, by a mark in their environment that all of them inherit."""

from __future__ import annotations

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
