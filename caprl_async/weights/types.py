"""What the driver, the learner's sender and the engines' receivers tell each other about one weight group.

Driver (`WeightSync`) -> `OpenInfo` -> learner rank 0 -> one `JoinInfo` per engine -> back through the driver
to the rollout actors. Everything else about a transfer travels on the group's own channel (`channel.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caprl_async.types import Version


class TransferFailed(RuntimeError):
    """A transfer broke before this engine's weights were touched: it goes on at its old version."""


class EngineDirty(RuntimeError):
    """A transfer broke while weights were being written: the engine stays paused and must be restarted."""


class LearnerLost(RuntimeError):
    """The learner's sending actor is gone; restart the gang, then make a new `WeightSync`.

    `failed`: engines that it may have left half written, and why: kill and restart them.
    """

    def __init__(self, reason: str, failed: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.failed = dict(failed or {})


@dataclass(frozen=True)
class OpenInfo:
    """Keyword arguments of `LearnerActor.open_weight_group`: a group of independent engines.

    The sender is rank 0; engine k's workers are the ranks from 1 + sum(sizes[:k]) on.
    """

    backend: str  # gloo | nccl | ipc
    epoch: int  # counts the groups that this driver opened; unrelated to Version.epoch
    sizes: tuple[int, ...]  # workers (tensor-parallel ranks) of each engine
    address: str  # the learner node's address that engines can reach
    timeout_s: float  # of every wait for another member

    @property
    def offsets(self) -> tuple[int, ...]:
        """Rank of each engine's first worker."""
        return tuple(1 + sum(self.sizes[:k]) for k in range(len(self.sizes)))

    @property
    def world_size(self) -> int:
        return 1 + sum(self.sizes)


@dataclass(frozen=True)
class JoinInfo:
    """Keyword arguments of `RolloutActor.join_weight_group`, and, with `version: str` added, of
    `RolloutActor.receive_weights`: where this engine finds its channel to the sender."""

    backend: str
    epoch: int
    address: str  # of the channel's TCPStore, on the learner's node
    port: int
    engine: int  # index of this engine in the group
    timeout_s: float


@dataclass(frozen=True)
class SyncReport:
    """What became of one publish.

    `announced` is true if every engine that is still in the group holds `version`; only then may the version
    be told to others. `failed` names the engines that left the group and why: kill and restart them, then
    `open` and publish again. A group that all engines have left has nobody to send to: not announced, none
    failed, `members` 0.
    """

    version: Version
    seconds: float  # wall clock of the publish, retries included
    engines: dict[str, float]  # seconds each engine was paused
    failed: dict[str, str] = field(default_factory=dict)
    announced: bool = True
    members: int = 1  # engines in the group afterwards
    error: str | None = None  # what broke an attempt, even if a retry went well
