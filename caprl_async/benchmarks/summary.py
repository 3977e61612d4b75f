"""From the scores of single answers to the figures of a table: means, best of k, and how sure they are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from caprl_async.benchmarks.items import Item

_RESAMPLES = 2000
_BATCH = 50  # resamples computed at one time, so that memory does not grow with the images


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval over images; None and None with fewer than two images."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """What one captioner reached on one benchmark."""

    items: int  # that were scored (circles count once)
    images: int
    unscored: int  # without one scored answer: they are in no mean
    mean: Interval  # over the captions of an image
    best: float  # the same, of each item's best caption
    categories: Mapping[str, float] = field(default_factory=dict)  # mean by category


def summarise(
    items: Sequence[Item], scores: Mapping[str, Sequence[float | None]], macro: bool = False, seed: int = 0
) -> Summary | None:
    """`scores`: item id -> the score of its answer from each of the k captions, None where there is none.

    Items of one circle (MMBench) count as one, right only if all are. With `macro` the mean is that of the
    categories' means. None if nothing was scored.
    """
    rows = [row for members in _circles(items) if (row := _row(members, scores)) is not None]
    unscored = len(_circles(items)) - len(rows)
    if not rows:
        return None
    names = sorted({row.category for row in rows})
    column = {name: index if macro else 0 for index, name in enumerate(names)}
    by_image: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_image[row.image].append(row)
    shape = (len(by_image), max(column.values()) + 1)
    sums, bests, counts = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for index, own in enumerate(by_image.values()):
        for row in own:
            place = index, column[row.category]
            sums[place] += row.mean
            bests[place] += row.best
            counts[place] += 1
    whole = np.arange(len(by_image))
    return Summary(
        items=len(rows),
        images=len(by_image),
        unscored=unscored,
        mean=_interval(sums, counts, seed),
        best=float(_ratio(bests, counts, whole)),
        categories={
            name: _mean([row.mean for row in rows if row.category == name]) for name in names if name
        },
    )


@dataclass(frozen=True)
class _Row:
    image: str
    category: str
    mean: float
    best: float


def _circles(items: Sequence[Item]) -> list[list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(f"circle {item.circle}" if item.circle else f"item {item.item_id}", []).append(item)
    return list(found.values())


def _row(members: Sequence[Item], scores: Mapping[str, Sequence[float | None]]) -> _Row | None:
    """None if no caption has a score for every member."""
    each = [scores.get(item.item_id, ()) for item in members]
    captions = min(map(len, each))
    whole = [
        min(value for value in column if value is not None)
        for column in zip(*(values[:captions] for values in each), strict=True)
        if None not in column
    ]
    if not whole:
        return None
    first = members[0]
    return _Row(
        first.images[0].sha256 if first.images else first.item_id, first.category, _mean(whole), max(whole)
    )


def _interval(sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> Interval:
    whole = np.arange(len(sums))
    mean = float(_ratio(sums, counts, whole))
    if len(sums) < 2:
        return Interval(mean, None, None)
    found = bootstrap(
        (whole,),
        lambda chosen, axis: _ratio(sums, counts, chosen),
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def _ratio(
    sums: NDArray[np.float64], counts: NDArray[np.float64], chosen: NDArray[np.intp]
) -> NDArray[np.float64]:
    """[..., images] chosen -> [...]: the mean over categories (those that were drawn) of items' means."""
    total, number = sums[chosen].sum(axis=-2), counts[chosen].sum(axis=-2)
    means = np.divide(total, number, out=np.full_like(total, math.nan), where=number > 0)
    return np.asarray(np.nanmean(means, axis=-1))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
