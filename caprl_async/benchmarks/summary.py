"""From the scores of single answers to the figures of a table: means, best of k, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from caprl_async.benchmarks.items import Item

_RESAMPLES = 2000
_BATCH = 50  # resamples computed at one time, so that memory does not grow with the images


Scores: TypeAlias = Mapping[str, Sequence[float | None]]
"""item id -> the score of its answer from each of the k captions, None where there is none."""


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


def summarise(items: Sequence[Item], scores: Scores, macro: bool = False, seed: int = 0) -> Summary | None:
    """The figures of one captioner.

    Items of one circle (MMBench) count as one, right only if all are. With `macro` the mean is that of the
    categories' means. None if nothing was scored.
    """
    rows = [row for members in _circles(items) if (row := _row(members, scores)) is not None]
    unscored = len(_circles(items)) - len(rows)
    if not rows:
        return None
    table = _table(rows, macro)
    names = sorted({row.category for row in rows if row.category})
    return Summary(
        items=len(rows),
        images=len(table.counts),
        unscored=unscored,
        mean=_interval(table.sums, table.counts, seed),
        best=float(_ratio(table.bests, table.counts, np.arange(len(table.counts)))),
        categories={name: _mean([row.mean for row in rows if row.category == name]) for name in names},
    )


def difference(
    items: Sequence[Item], one: Scores, other: Scores, macro: bool = False, seed: int = 0
) -> Interval | None:
    """How much better `other` is than `one` on the items that both have a score for: paired, so that what an
    image brings is the same for both. None if there is no such item."""
    rows = [
        replace(b, mean=b.mean - a.mean, best=b.best - a.best)
        for members in _circles(items)
        if (a := _row(members, one)) is not None and (b := _row(members, other)) is not None
    ]
    if not rows:
        return None
    table = _table(rows, macro)
    return _interval(table.sums, table.counts, seed)


@dataclass(frozen=True)
class _Table:
    """Of shape [images, categories (or 1)]."""

    sums: NDArray[np.float64]
    bests: NDArray[np.float64]
    counts: NDArray[np.float64]


def _table(rows: Sequence[_Row], macro: bool) -> _Table:
    names = sorted({row.category for row in rows})
    column = {name: index if macro else 0 for index, name in enumerate(names)}
    images = {name: index for index, name in enumerate(dict.fromkeys(row.image for row in rows))}
    shape = (len(images), max(column.values()) + 1)
    sums, bests, counts = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for row in rows:
        place = images[row.image], column[row.category]
        sums[place] += row.mean
        bests[place] += row.best
        counts[place] += 1
    return _Table(sums, bests, counts)


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


def _row(members: Sequence[Item], scores: Scores) -> _Row | None:
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
