"""What failed control calls mean: for the ring, and for an actor that has no memory left."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from caprl_async.ring.calls import failure, out_of_memory
from caprl_async.ring.crew import HUB
from caprl_async.ring.errors import RingFailed
from caprl_async.ring.supervisor import Supervisor


def failed(cause: Exception) -> RingFailed:
    """As `wait_for` raises it."""
    error = RayTaskError("status", "a traceback", cause)
    found = failure("replay-queue", error)
    found.__cause__ = error
    return found


@pytest.mark.parametrize(
    ("cause", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("memory"), False),
        (RuntimeError("another reason"), False),
    ],
)
def test_which_failures_mean_exhausted_memory(cause: Exception, memory: bool) -> None:
    assert out_of_memory(failed(cause)) == memory


class Pretended(Supervisor):
    """A ring whose queue answers as told."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.killed: list[str] = []
        self.said: list[str] = []
        self._say = self.said.append
        self._handles = {HUB: self}  # type: ignore[dict-item]
        self._watch = self  # type: ignore[assignment]

    def status(self) -> Any:
        raise AssertionError("called through `remote`")

    status.remote = lambda: None  # type: ignore[attr-defined]

    def kill(self, name: str) -> None:
        self.killed.append(name)

    def get_all(self, refs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def _pause(self) -> None:
        pass


def test_a_queue_without_memory_is_killed_and_asked_again() -> None:
    ring = Pretended([failed(RuntimeError("can't start new thread")), {"queue": {}}])
    assert ring.ask_hub("status") == {"queue": {}}
    assert ring.killed == [HUB]
    assert "can't start new thread" in ring.said[0]


def test_any_other_failure_of_the_queue_ends_the_run() -> None:
    ring = Pretended([failed(ValueError("wrong"))])
    with pytest.raises(RingFailed, match="wrong"):
        ring.ask_hub("status")
    assert ring.killed == []
