"""How old a caption's tokens are, and which groups a batch takes; pure functions of the queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from caprl_async.types import CaptionGroup, ScoredGroup, Version

Bases = Mapping[int, int]
"""epoch -> the step from which it went on; epoch 0, which began with the run, is not in it."""


def descends(old: Version, new: Version, bases: Bases) -> bool:
    """True if the weights `new` were made from `old`: no rollback between went back behind them."""
    if not (0 <= old.epoch <= new.epoch and old.step <= new.step):
        return False
    return all(old.step <= bases.get(epoch, -1) for epoch in range(old.epoch + 1, new.epoch + 1))


def fresh(oldest: Version, learner: Version, max_staleness: int, bases: Bases) -> bool:
    """True if a token of version `oldest` may enter the batch of version `learner`.

    Weights of steps that were rolled back never may.
    """
    return learner.step - max_staleness <= oldest.step and descends(oldest, learner, bases)


def group_fresh(group: CaptionGroup, learner: Version, max_staleness: int, bases: Bases) -> bool:
    """True if every token of the group may enter the batch of version `learner`."""
    return all(
        fresh(span.version, learner, max_staleness, bases)
        for caption in group.captions
        for span in caption.spans
    )


def choose(ready: Iterable[ScoredGroup], size: int, max_staleness: int) -> tuple[ScoredGroup, ...] | None:
    """The `size` groups of the next batch, or None if there are not enough; all of `ready` must be fresh.

    With `max_staleness` 0 the batch is in the sampler's order; otherwise the oldest version goes first, so
    that nothing grows stale while it waits.
    """
    waiting = list(ready)
    if len(waiting) < size:
        return None
    if max_staleness == 0:
        return tuple(sorted(waiting, key=lambda scored: scored.index)[:size])
    return tuple(sorted(waiting, key=lambda scored: (scored.group.oldest, scored.index))[:size])


def token_staleness(groups: Sequence[ScoredGroup], version: Version) -> dict[int, int]:
    """Number of tokens by staleness in learner steps, for a batch cut at `version`."""
    histogram: dict[int, int] = {}
    for scored in groups:
        for caption in scored.group.captions:
            for span in caption.spans:
                age = version.step - span.version.step
                histogram[age] = histogram.get(age, 0) + span.end - span.start
    return histogram
