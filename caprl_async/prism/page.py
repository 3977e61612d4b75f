"""The page of one evaluation, or of several side by side: figures, images, captions, answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from caprl_async.benchmarks.table import BENCHMARKS
from caprl_async.observe.pages import data_uri, template, write_page
from caprl_async.prism.compare import Side, shown

_TEMPLATE = Path(__file__).with_name("page.html")

Figure = tuple[str, str, Callable[[Mapping[str, Any]], Any]]


def _interval(value: Any) -> str:
    if value is None:
        return ""
    if value["low"] is None:
        return f"{value['mean']:.1%}"
    return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def _percent(value: Any) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


FIGURES: tuple[Figure, ...] = (
    ("score", "mean over questions and captions, 95 % interval over images", lambda r: _interval(r["mean"])),
    ("best of k", "of each question's best caption", lambda r: _percent(r["best"])),
    ("floor", "answered without a caption", lambda r: _interval(r["blind"])),
    ("ceiling", "answered from the reference captions", lambda r: _interval(r["ceiling"])),
    ("CaptionQA", "a wrong answer is worth less than none", lambda r: _interval(r["caption_qa"])),
    (
        "honest",
        "questions about what is absent, not answered",
        lambda r: _percent(r["categories"].get("absent")),
    ),
    ("words", "of a caption, mean", lambda r: _number(r["captions"]["words_mean"])),
    ("words, longest", "95 of 100 captions are no longer", lambda r: _number(r["captions"]["words_95th"])),
    ("repetition", "share of 4-word runs that came before", lambda r: _percent(r["captions"]["repetition"])),
    ("cut", "captions that met the token limit", lambda r: _percent(r["captions"]["truncated"])),
    ("meta", "captions that speak of themselves", lambda r: _percent(r["captions"]["meta"])),
    ("leaks", "captions that speak of an answer", lambda r: _percent(r["captions"]["answer_leak"])),
)
"""Name, meaning, and how it is read from a result; what is empty for all runs is not shown."""


def rows(sides: Sequence[Side]) -> list[tuple[str, str, list[str]]]:
    """(name, meaning, text per run) of the figures that some run has."""
    found = [(name, what, [read(side.run.result) for side in sides]) for name, what, read in FIGURES]
    if len(sides) > 1:
        better = ["" if side.better is None else _interval(asdict(side.better)) for side in sides]
        found.insert(1, ("better by", "than the first, on the same questions", better))
    return [row for row in found if any(row[2])]


def write(sides: Sequence[Side], path: Path, images: int) -> Path:
    """Writes the page; returns its path."""
    first = sides[0].run.result
    known = BENCHMARKS.get(str(first["benchmark"]))
    pictures = shown([side.run for side in sides], images)
    names = sorted({name for side in sides for name in side.run.result["categories"]})
    page = template(_TEMPLATE).render(
        title=known.title if known else "CapRL-QA questions",
        answerer=first["answerer"],
        sides=sides,
        figures=rows(sides),
        categories=[
            (name, [_percent(side.run.result["categories"].get(name)) for side in sides]) for name in names
        ],
        shown=[(one, data_uri(Path(one.path))) for one in pictures],
    )
    return write_page(path, page)
