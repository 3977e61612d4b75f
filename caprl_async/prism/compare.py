"""Evaluations of the same questions side by side: figures, paired differences, the images that tell most."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.reading import read_choice
from caprl_async.benchmarks.summary import Interval, difference
from caprl_async.benchmarks.table import BENCHMARKS
from caprl_async.data.rows import DataError
from caprl_async.prism.runs import Run
from caprl_async.prism.told import Told
from caprl_async.types import ImageRef

RIGHT = 0.5
"""A written answer's score from here on is shown as right."""


@dataclass(frozen=True)
class Side:
    """One run beside the first one."""

    run: Run
    better: (
        Interval | None
    )  # mean difference to the first run on the questions that both have; None: it is it
    shared: int  # those questions


@dataclass(frozen=True)
class Cell:
    """What came of one question with one captioner's first caption."""

    answer: str
    score: float | None
    right: bool


@dataclass(frozen=True)
class Shown:
    """One image with its captions and questions."""

    path: str
    captions: Sequence[str]  # of each run the first
    questions: Sequence[tuple[Item, Sequence[Cell]]]
    spread: float  # between the runs' mean scores on it


def sides(runs: Sequence[Run], seed: int) -> list[Side]:
    """The runs, each held against the first.

    Raises:
        DataError: they measure different things, or no question is asked in all of them.
    """
    first = runs[0]
    for run in runs[1:]:
        one, other = _asked(first), _asked(run)
        for key in one | other:
            if one.get(key) != other.get(key):
                raise DataError(
                    f"{first.name} and {run.name} cannot be compared: {key} {one.get(key)!r} and "
                    f"{other.get(key)!r}"
                )
    known = BENCHMARKS.get(str(first.result["benchmark"]))
    macro = known is not None and known.macro
    return [Side(first, None, len(first.questions)), *(_side(run, first, macro, seed) for run in runs[1:])]


def _asked(run: Run) -> dict[str, Any]:
    return {"benchmark": run.result["benchmark"], **run.result["asking"]}


def as_json(found: Sequence[Side]) -> list[dict[str, Any]]:
    """The figures of each run."""
    return [
        {
            "run": side.run.name,
            **side.run.result,
            "better_than_first": asdict(side.better) if side.better else None,
            "shared_questions": side.shared,
        }
        for side in found
    ]


def shown(runs: Sequence[Run], images: int) -> list[Shown]:
    """So many images that all runs have captioned: half of them those on which the runs differ most, the
    rest the first of the file."""
    told = [{line.item.item_id: line.told for line in run.questions} for run in runs]
    by_image: dict[str, list[Item]] = defaultdict(list)
    for line in runs[0].questions:
        by_image[line.item.images[0].sha256].append(line.item)
    every = [
        _shown(sha256, items, runs, told)
        for sha256, items in by_image.items()
        if all(sha256 in run.images for run in runs)
    ]
    most = sorted(every, key=lambda one: -one.spread)[: images // 2] if len(runs) > 1 else []
    most = [one for one in most if one.spread > 0]
    return [*most, *(one for one in every if one not in most)][:images]


def _side(run: Run, first: Run, macro: bool, seed: int) -> Side:
    theirs = {line.item.item_id: _content(line.item) for line in run.questions}
    same = [line.item for line in first.questions if theirs.get(line.item.item_id) == _content(line.item)]
    one, other = _scores(first), _scores(run)
    items = [item for item in same if item.item_id in one and item.item_id in other]
    if not items:
        raise DataError(f"{first.name} and {run.name} have no question in common")
    return Side(run, difference(items, one, other, macro, seed), len(items))


def _content(item: Item) -> Item:
    """The item wherever its images lie."""
    return replace(item, images=tuple(ImageRef(sha256=image.sha256, path="") for image in item.images))


def _scores(run: Run) -> dict[str, Sequence[float | None]]:
    return {line.item.item_id: line.told.scores for line in run.questions if line.told is not None}


def _shown(
    sha256: str, items: Sequence[Item], runs: Sequence[Run], told: Sequence[Mapping[str, Told | None]]
) -> Shown:
    questions = [(item, [_cell(item, own.get(item.item_id)) for own in told]) for item in items]
    means = [
        fmean(scores)
        for column in zip(*(cells for _, cells in questions), strict=True)  # of a run
        if (scores := [cell.score for cell in column if cell.score is not None])
    ]
    image = runs[0].images[sha256]
    return Shown(
        path=image.path,
        captions=[(run.images[sha256].captions or [""])[0] for run in runs],
        questions=questions,
        spread=max(means) - min(means) if len(means) == len(runs) else 0.0,
    )


def _cell(item: Item, told: Told | None) -> Cell:
    """Of a choice the option's text; it is right if it is the gold one, whatever its probability."""
    if told is None or not told.scores or told.scores[0] is None:
        return Cell("", None, False)
    answer, score = told.answers[0], told.scores[0]
    said = read_choice(answer, item.options) if item.rule is Rule.CHOICE else None
    if said is None:
        return Cell(answer, score, score >= RIGHT and item.rule is not Rule.CHOICE)
    text = answer if item.mere_letters else item.options[said]
    return Cell(text, score, string.ascii_uppercase[said] in item.golds)
