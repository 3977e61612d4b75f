"""What a process of the ring tells of itself: where it runs, and, in its title, what it is doing.

`ps -eo pid,args | grep ray::` then shows the whole ring: `ray::learner-0: training 0.12, sending 0.11`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_name = ""
_set_title: Callable[[str], None] | None = None  # Ray's
_doing: dict[str, int] = {}  # in order of their beginning; how often each is going on


def whereabouts() -> dict[str, Any]:
    """`pid`, and `node`, Ray's id of it; empty outside of Ray."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return {"pid": os.getpid(), "node": node}


def call_me(name: str) -> None:
    """Names this process after its actor; nothing in a process that is none's, as of a test."""
    global _name, _set_title
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    with _lock:
        _name = name
        if _set_title is None:
            # Ray writes the name of every method that it calls, also when that has returned: no longer.
            raylet: Any = ray._raylet
            _set_title, raylet.setproctitle = raylet.setproctitle, _keep_title
        _show()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Has the title say so as long as the block lasts; several things may go on at one time."""
    _count(what, 1)
    try:
        yield
    finally:
        _count(what, -1)


def _count(what: str, change: int) -> None:
    with _lock:
        before = _doing.get(what, 0)
        _doing[what] = before + change
        if not _doing[what]:
            del _doing[what]
        if not before or what not in _doing:
            _show()


def _show() -> None:
    if _set_title is not None:
        _set_title(f"ray::{_name}" + (f": {', '.join(_doing)}" if _doing else ""))


def _keep_title(title: str) -> None:
    """Stands where Ray finds its own `setproctitle`."""
