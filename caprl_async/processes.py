"""Finds and ends what a process has started, directly or through others; the watchdog's broom.

A mark in the environment would not find all of them: Ray's agents write their titles over it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.1
_TERM_S = 2.0  # from SIGTERM to SIGKILL
_KILL_S = 5.0  # for the kernel to do so


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parent ends, as init otherwise is.

    Without this, what a dead process has started could not be told from what others have.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury_orphans(own: int) -> None:
    """Collects ended adopted processes, as init does; not the child `own`, whose exit code is awaited.

    Ray's workers end when their raylet is gone, and an uncollected one counts as still there.
    """
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):  # there is none at all
        while (ended := os.waitid(os.P_ALL, 0, flags)) is not None and ended.si_pid != own:
            os.waitpid(ended.si_pid, 0)


def descendants(spare: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """Everything alive that this process has started, and what that has started, and so on; not `spare`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            if process not in spare and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def titles(processes: list[psutil.Process]) -> list[str]:
    """How `ps` shows them, shortened."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(f"{process.pid} {' '.join(process.cmdline())[:60] or process.name()}")
    return found


def end_descendants(patience_s: float, spare: Collection[psutil.Process] = ()) -> list[str]:
    """Lets all descendants but `spare` go by themselves for `patience_s`, then ends them; returns which.

    Not for a process that still awaits a child's exit code: it is lost.
    """
    _all_gone(spare, patience_s)
    left = titles(descendants(spare))
    _all_gone(spare, _TERM_S, signal.SIGTERM)
    _all_gone(spare, _KILL_S, signal.SIGKILL)  # ends stopped ones as well
    return left


def _all_gone(
    spare: Collection[psutil.Process], seconds: float, signum: signal.Signals | None = None
) -> None:
    """Waits until there are no descendants; each that is seen is sent the signal, once."""
    deadline = time.monotonic() + seconds
    told: set[psutil.Process] = set()
    looks = 0  # in a row that found nothing; one that meets a change of parents may miss a child
    while looks < 2 and time.monotonic() < deadline:
        bury_orphans(own=0)
        alive = descendants(spare)
        looks = 0 if alive else looks + 1
        for process in alive:
            if signum is not None and process not in told:
                told.add(process)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signum)
        time.sleep(_LOOK_S)
