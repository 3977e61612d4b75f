"""Prism: captions of a benchmark's images, its questions answered from the captions alone, what that scores.

Passes, each resumable: `captioner` captions every image k times; `answerer`, which never sees an image,
answers every question from each caption, and `grader` compares where no rule can; of CapRL-QA data, `judge`
answers instead.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from caprl_async import conf
from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.load import limited, load_items
from caprl_async.benchmarks.table import BENCHMARKS, CAPRL_QA
from caprl_async.config import Config
from caprl_async.data.images import ImageStore, image_folder
from caprl_async.data.rows import append_rejects
from caprl_async.files import write_json
from caprl_async.jobs.annotate import SOME_FAILED
from caprl_async.prism import by_answerer, by_judge, page
from caprl_async.prism.captions import Captions, captions_of, measures
from caprl_async.prism.compare import Side
from caprl_async.prism.names import IMAGES, QUESTIONS, RESULT
from caprl_async.prism.passes import Passes
from caprl_async.prism.runs import ImageLine, QuestionLine, read_run, write_lines
from caprl_async.prism.told import Examined, Figures, figures
from caprl_async.ring.errors import RingFailed
from caprl_async.stream import on_ray
from caprl_async.stream.judging import about_judge
from caprl_async.stream.stage import explained
from caprl_async.writer.writer import about_writer, model_name

REJECTS = "rejects.jsonl"
PAGE = "report.html"


def run(config: Config) -> None:
    """
    Raises:
        ConfError: a file cannot be read, or the folder holds another job.
        RingFailed: a model could not be started, or answers no more.
        SystemExit: with 3, if all is through and some questions have no score.
    """
    console = Console(stderr=True)
    with conf.run_folder(config) as folder:
        with explained():
            job = _Prism(config, folder, console)
        with on_ray(config):
            found = job.whole()
    if found.summary.unscored:
        sys.exit(SOME_FAILED)


class _Prism:
    """One start of the job."""

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        """
        Raises:
            DataError: the benchmark's file cannot be used.
        """
        self._config = config
        self._folder = folder
        self._console = console
        self._judged = config.prism.benchmark == CAPRL_QA
        self._passes = Passes(config, folder, console)
        self._title, self._macro = "CapRL-QA", False
        self._load(ImageStore(image_folder(config, folder)))

    def _load(self, store: ImageStore) -> None:
        prism, abstain = self._config.prism, self._config.judge.prompt.abstain
        if self._judged:
            self._rows, rejects = by_judge.load_asked(Path(prism.data), store, abstain, prism.limit)
            self._items = [item for row in self._rows for item in row.items(abstain)]
        else:
            benchmark = BENCHMARKS[prism.benchmark]
            self._title, self._macro = benchmark.title, benchmark.macro
            found = load_items(prism.benchmark, Path(prism.data), store)
            rejects = list(found.rejects)
            self._items = limited(found.items, prism.limit)
            if prism.abstain:
                self._items = [item.offering(abstain) for item in self._items]
        (self._folder / REJECTS).unlink(missing_ok=True)
        append_rejects(self._folder / REJECTS, Path(prism.data), rejects)
        self._told(f"{self._title}: {len(self._items)} questions, {len(rejects)} that cannot be asked")

    def whole(self) -> Figures:
        """Everything; returns what it came to."""
        config = self._config
        captions = self._passes.captions(self._items)
        missing: list[str] = []
        if self._judged:
            told: Examined = by_judge.ask(self._rows, captions, self._passes, missing)
        else:
            told = by_answerer.ask(self._items, captions, config, self._passes, missing)
        if missing:
            self._told(f"{len(missing)} questions are about images without a caption")
        found = figures(self._items, told, macro=self._macro, seed=config.seed)
        if found is None:
            raise RingFailed(
                "no question has a score: see failures.jsonl in the folders of captions and answers"
            )
        self._conclude(found, captions, told)
        return found

    def _conclude(self, found: Figures, captions: Captions, told: Examined) -> None:
        folder, prism = self._folder, self._config.prism
        lines = [QuestionLine(item, told.get(item.item_id)) for item in self._items]
        write_lines(folder / QUESTIONS, lines)
        write_lines(folder / IMAGES, _images(self._items, captions))
        result: dict[str, Any] = {
            "benchmark": prism.benchmark,
            "captioner": prism.captions_from or model_name(self._config.captioner),
            "answerer": self._answerer(),
            "asking": self._asking(),
            "captions_per_image": max((len(one.answers) for one in told.values()), default=0),
            "captions": measures(captions, self._items),
            **found.as_json(),
        }
        write_json(folder / RESULT, result)
        side = Side(read_run(folder), None, len(self._items))
        page.write([side], folder / PAGE, self._config.compare.images)
        self._console.print(table([side], self._title))
        summary = found.summary
        unscored = f", {summary.unscored} without a score" if summary.unscored else ""
        self._told(f"{summary.items} questions scored {summary.mean.mean:.1%}{unscored}: {folder / PAGE}")

    def _answerer(self) -> str:
        judge = self._config.judge
        return (judge.endpoint.url or judge.model) if self._judged else model_name(self._config.answerer)

    def _asking(self) -> dict[str, Any]:
        """All that the answers depend on beside captions and questions."""
        prism = self._config.prism
        if self._judged:
            return about_judge(self._config.judge)
        graded = any(item.rule is Rule.GRADED for item in self._items)
        return {
            "answerer": about_writer(self._config.answerer),
            "grader": about_writer(self._config.grader) if graded else None,
            "template": prism.template,
            "abstain": prism.abstain,
        }

    def _told(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def table(sides: list[Side], title: str) -> Table:
    """The figures of runs, for a terminal."""
    shown = Table(title=title)
    for name in ("", *(side.run.name for side in sides)):
        shown.add_column(escape(name))
    for name, _, values in page.rows(sides):
        shown.add_row(name, *map(escape, values))
    for name in sorted({name for side in sides for name in side.run.result["categories"]}):
        shares = [side.run.result["categories"].get(name) for side in sides]
        shown.add_row(escape(f"  {name}"), *("" if share is None else f"{share:.1%}" for share in shares))
    return shown


def _images(items: list[Item], captions: Captions) -> list[ImageLine]:
    found: dict[str, ImageLine] = {}
    for item in items:
        for image, (_, own) in zip(item.images, captions_of(item, captions), strict=True):
            found.setdefault(
                image.sha256, ImageLine(image.sha256, image.path, [caption.text for caption in own])
            )
    return list(found.values())
