"""How old a caption's tokens are, and which groups a batch takes; pure functions of the queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from caprl_async.types import CaptionGroup, ScoredGroup, Version


def fresh(oldest: Version, newest_allowed: Version, max_staleness: int) -> bool:
    """True if a token of version `oldest` may enter the batch of version `newest_allowed`.

    Another epoch's weights belong to steps that were rolled back, so they never may.
    """
    same_epoch = oldest.epoch == newest_allowed.epoch
    return same_epoch and newest_allowed.step - max_staleness <= oldest.step <= newest_allowed.step


def group_fresh(group: CaptionGroup, version: Version, max_staleness: int) -> bool:
    """True if every token of the group may enter the batch of `version`."""
    return all(
        fresh(span.version, version, max_staleness) for caption in group.captions for span in caption.spans
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
