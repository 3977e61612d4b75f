"""Prism: captions of a benchmark's images, its questions answered from the captions alone, the score of that.

Three passes, each resumable: `captioner` captions every image k times, `answerer` (which never sees an image)
answers every question from each caption, and `grader` compares where no rule can.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from caprl_async import conf
from caprl_async.benchmarks.asking import grade_text, prompt_text, read_grade
from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.load import load_items
from caprl_async.benchmarks.scorers import score
from caprl_async.benchmarks.summary import Summary, summarise
from caprl_async.benchmarks.table import BENCHMARKS
from caprl_async.config import Config, WriterConfig
from caprl_async.data.images import ImageStore, image_folder
from caprl_async.data.rows import append_rejects
from caprl_async.files import write_json
from caprl_async.jobs.annotate import CAPTIONS, FAILURES, RESULT, SOME_FAILED, Captioned, about_captions
from caprl_async.ring.errors import RingFailed
from caprl_async.stream import on_ray
from caprl_async.stream.captions import read_captions
from caprl_async.stream.pipeline import run_pass
from caprl_async.stream.shards import CAPTIONED, Parquet
from caprl_async.stream.sources import listed
from caprl_async.stream.stage import asking, explained
from caprl_async.stream.texts import ANSWERED, Texts, rows_of
from caprl_async.writer.writer import model_name

ANSWERS = "answers"
GRADES = "grades"
SCORES = "scores.jsonl"
REJECTS = "rejects.jsonl"
_ROWS = 2000  # of an output file

Captions = Mapping[str, Sequence[str]]
"""Captions by the image's sha256."""


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
            summary = job.whole()
    if summary.unscored:
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
        prism = config.prism
        found = load_items(prism.benchmark, Path(prism.data), ImageStore(image_folder(config, folder)))
        self._items = found.items[: prism.limit or None]
        append_rejects(folder / REJECTS, Path(prism.data), found.rejects)
        self._told(f"{BENCHMARKS[prism.benchmark].title}: {len(self._items)} questions, "
                   f"{len(found.rejects)} rows that cannot be asked")  # fmt: skip

    def whole(self) -> Summary:
        """Everything; returns what it came to."""
        captions = self._captions()
        answers = self._answers(captions)
        scores = self._scores(answers)
        summary = summarise(
            self._items, scores, macro=BENCHMARKS[self._config.prism.benchmark].macro, seed=self._config.seed
        )
        if summary is None:
            raise RingFailed(
                "no question has a score: see failures.jsonl in the folders of captions and answers"
            )
        self._conclude(summary, captions, answers, scores)
        return summary

    # ------------------------------------------------------------ passes

    def _captions(self) -> Captions:
        prism, config = self._config.prism, self._config
        if prism.captions_from:
            with explained():
                return read_captions(Path(prism.captions_from))
        images = {image.sha256: image for item in self._items for image in item.images}
        what = Captioned(config.data.prompt, prism.captions, config.seed)
        about = about_captions(config, prism.captions)
        shards = self._shards(CAPTIONS, about, CAPTIONED)
        stage = asking(config.captioner, "captioner", config.seed, what, CAPTIONED)
        run_pass(
            listed(images.values()), len(images), stage, shards,
             self._folder / CAPTIONS / FAILURES, self._console, what="images",
        )  # fmt: skip
        return {row["sha256"]: row["captions"] for row in shards.read()}

    def _answers(self, captions: Captions) -> Mapping[str, Sequence[str]]:
        """item id -> the answer from each caption."""
        prompts = {item.item_id: self._prompts(item, captions) for item in self._items}
        asked = {item_id: texts for item_id, texts in prompts.items() if texts}
        if missing := len(prompts) - len(asked):
            self._told(f"{missing} questions are about images without a caption")
        about = {**_about(self._config.answerer), "template": self._config.prism.template}
        return self._pass(ANSWERS, "questions", self._config.answerer, "answerer", about, asked)

    def _prompts(self, item: Item, captions: Captions) -> list[str]:
        """One for each caption; of several images, the nth captions of all."""
        told = [captions.get(image.sha256) or captions.get(item.item_id) or () for image in item.images]
        return [prompt_text(self._config.prism.template, each, item) for each in zip(*told, strict=False)]

    def _scores(self, answers: Mapping[str, Sequence[str]]) -> dict[str, list[float | None]]:
        """item id -> the score of each answer; None where a grader gave none."""
        by_rule = [item for item in self._items if item.item_id in answers and item.rule is not Rule.GRADED]
        scores: dict[str, list[float | None]] = {
            item.item_id: [score(text, item) for text in answers[item.item_id]] for item in by_rule
        }
        graded = {
            item.item_id: [grade_text(item, text) for text in answers[item.item_id]]
            for item in self._items
            if item.item_id in answers and item.rule is Rule.GRADED
        }
        if graded:
            grader = self._config.grader
            grades = self._pass(GRADES, "answers to grade", grader, "grader", _about(grader), graded)
            scores |= {item_id: list(map(read_grade, texts)) for item_id, texts in grades.items()}
        return scores

    def _pass(
        self, name: str, what: str, model: WriterConfig, key: str, about: Mapping[str, Any],
        prompts: Mapping[str, Sequence[str]],
    ) -> dict[str, Sequence[str]]:  # fmt: skip
        shards, texts = self._shards(name, about, ANSWERED), Texts(self._config.seed)
        run_pass(
            rows_of(prompts), len(prompts), asking(model, key, self._config.seed, texts, ANSWERED),
            shards, self._folder / name / FAILURES, self._console, what=what,
        )  # fmt: skip
        return {row["id"]: row["answers"] for row in shards.read()}

    def _shards(self, name: str, about: Mapping[str, Any], schema: pa.Schema) -> Parquet:
        with explained():
            return Parquet(self._folder / name, name, _ROWS, about, schema)

    # ------------------------------------------------------------ the result

    def _conclude(
        self, summary: Summary, captions: Captions, answers: Mapping[str, Sequence[str]],
        scores: Mapping[str, Sequence[float | None]],
    ) -> None:  # fmt: skip
        prism = self._config.prism
        with (self._folder / SCORES).open("w", encoding="utf-8") as out:
            for item in self._items:
                told = {
                    "id": item.item_id, "images": [image.sha256 for image in item.images],
                    "question": item.question, "options": item.options, "golds": item.golds,
                    "answers": answers.get(item.item_id, ()), "scores": scores.get(item.item_id, ()),
                }  # fmt: skip
                out.write(json.dumps(told, ensure_ascii=False) + "\n")
        result = {
            "benchmark": prism.benchmark,
            "captioner": prism.captions_from or _about(self._config.captioner)["model"],
            "answerer": _about(self._config.answerer)["model"],
            "captions": max((len(texts) for texts in answers.values()), default=0),
            "words_per_caption": _words([text for texts in captions.values() for text in texts]),
            **asdict(summary),
        }
        write_json(self._folder / RESULT, result)
        self._console.print(_table(BENCHMARKS[prism.benchmark].title, summary))
        unscored = f", {summary.unscored} without a score" if summary.unscored else ""
        self._told(
            f"{summary.items} questions scored {summary.mean.mean:.1%}{unscored}: {self._folder / RESULT}"
        )

    def _told(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _about(model: WriterConfig) -> dict[str, Any]:
    return {
        "model": model_name(model),
        "temperature": model.temperature,
        "max_tokens": model.max_tokens,
    }


def _words(captions: Sequence[str]) -> float:
    return sum(len(text.split()) for text in captions) / max(1, len(captions))


def _table(title: str, summary: Summary) -> Table:
    table = Table(title=title)
    for column in ("", "mean", "95 % interval", "best of k"):
        table.add_column(column)
    low, high = summary.mean.low, summary.mean.high
    interval = f"{low:.1%} to {high:.1%}" if low is not None and high is not None else ""
    table.add_row("all", f"{summary.mean.mean:.1%}", interval, f"{summary.best:.1%}")
    for name, mean in summary.categories.items():
        table.add_row(name, f"{mean:.1%}")
    return table
