"""How many prompts may be on their way, and which rollout may caption one; pure functions of the queue."""

from __future__ import annotations

from caprl_async.replay.staleness import Bases, fresh
from caprl_async.types import Version


def capacity(*, max_staleness: int, steps: int, batch_groups: int, taken: int, outstanding: int) -> int:
    """New prompts to admit: (max_staleness + steps + 1) * batch_groups - (taken + outstanding).

    Within this bound (AReaL, arXiv 2505.24298) what is sampled now is trained on no later than
    `max_staleness` steps after the weights that sample it. With `max_staleness` 0 it is exactly the batch
    that is being collected.

    Args:
        steps: learner steps behind the weights of the engine that will sample, counted from where this run
            (or epoch) began. The learner may be ahead: an engine gets its weights after a transfer.
        taken: groups in the batches of all steps and in one that is cut and not yet trained on.
        outstanding: prompts admitted and neither taken nor evicted. An evicted prompt gives its place back,
            which is the refill.
    """
    return (max_staleness + steps + 1) * batch_groups - taken - outstanding


def may_caption(engine: Version | None, learner: Version, max_staleness: int, bases: Bases) -> bool:
    """True if captions begun now under `engine`'s weights could enter the learner's next batch."""
    return engine is not None and fresh(engine, learner, max_staleness, bases)
