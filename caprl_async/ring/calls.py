"""Waits for control calls, and says what became of those that failed."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RpcError,
)

from caprl_async.ring.errors import ActorLost, RingFailed, RingLost

_LOST = (LocalRayletDiedError, RaySystemError, RpcError)


def wait_for(refs: Sequence[Any], name: str, tick: Callable[[float, bool], None]) -> list[Any]:
    """The results of control calls to actors; `tick(seconds, idle)` is called at least once a second.

    Raises:
        ActorLost: an actor died.
        RingLost: Ray is gone.
        RingFailed: a call failed.
    """
    began = time.monotonic()
    waiting = list(refs)
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=1.0)
        try:
            ray.get(ready)
        except RayError as error:
            raise failure(name, error) from error
        tick(time.monotonic() - began, not ready)
    return list(ray.get(list(refs)))


def failure(name: str, error: RayError) -> RingFailed:
    """What a call's error means for the ring."""
    if isinstance(error, RayActorError):
        return ActorLost(name or "an actor", _said(error))
    if isinstance(error, _LOST) and not isinstance(error, RayTaskError):
        return RingLost(f"Ray is gone: {_said(error)}")
    return RingFailed(f"{name or 'the ring'} failed: {_said(error)}")


def out_of_memory(error: RingFailed) -> bool:
    """Whether a call failed because its process has no memory left: a fresh one may have some.

    Beside MemoryError: allocators of torch and CUDA, threads that cannot be started, calls of the system.
    """
    cause = getattr(error.__cause__, "cause", None)
    if isinstance(cause, OSError):
        return cause.errno == errno.ENOMEM
    told = isinstance(cause, RuntimeError) and re.search("memory|can't start new thread", str(cause))
    return isinstance(cause, MemoryError) or bool(told)


def _said(error: RayError) -> str:
    cause = getattr(error, "cause", None)
    # Of an actor that could not even be made, Ray gives the remote traceback; its last line is the error.
    return f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[-1]
