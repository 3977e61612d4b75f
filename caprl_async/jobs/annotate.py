"""A captioner over any number of images: `data.images` in, a data set of captions out, each image once.

A row that has no caption is in `failures.jsonl` with the reason; `resume=true` tries it again, and goes on
after whatever has ended the job.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.judge.permutations import seed_of
from caprl_async.observe.counting import Counting
from caprl_async.ring import cluster
from caprl_async.stream import hush
from caprl_async.stream.done import Done
from caprl_async.stream.shards import FORMS, Shards
from caprl_async.stream.sources import open_images
from caprl_async.stream.stage import Row, explained, through
from caprl_async.types import ImageData
from caprl_async.writer.types import Ask, Text

CAPTIONS = "captions"
FAILURES = "failures.jsonl"
RESULT = "result.json"
SOME_FAILED = 3
"""Exit code of a job that is through, with rows that failed."""


def run(config: Config) -> None:
    """
    Raises:
        ConfError: the source cannot be read, or the folder holds another job.
        RingFailed: the captioner could not be started, or answers no more.
        SystemExit: with 3, if all images are through and some have no caption.
    """
    console = Console(stderr=True)
    with conf.run_folder(config) as folder:
        shards = FORMS[config.annotate.form](
            folder / CAPTIONS, CAPTIONS, config.annotate.rows_per_file, _about(config)
        )
        done = Done(shards.ids())
        if len(done):
            console.print(f"{len(done)} images have captions already", markup=False)
        job = _Annotation(config, folder, shards, console)
        try:
            cluster.connect(config.ring, log_level=config.observe.log_level)
            hush(config.observe.log_level)
            with explained():
                failed = job.whole(done)
        finally:
            cluster.disconnect()
    if failed:
        sys.exit(SOME_FAILED)


def _about(config: Config) -> dict[str, Any]:
    """How the captions are made, for whoever finds them."""
    captioner = config.captioner
    return {
        "captioner": captioner.endpoint.model or captioner.endpoint.url or captioner.model,
        "prompt": config.data.prompt,
        "temperature": captioner.temperature,
        "max_tokens": captioner.max_tokens,
        "min_pixels": captioner.min_pixels,
        "max_pixels": captioner.max_pixels,
        "seed": config.seed,
        "source": config.data.images,
    }


@dataclasses.dataclass(frozen=True)
class Captioned:
    """What is asked about a row, and what becomes of the answers; sent to the actors."""

    prompt: str
    captions: int
    seed: int

    def asks(self, row: Row) -> Sequence[Ask]:
        """
        Raises:
            OSError: the image's file cannot be read.
        """
        data = row["data"] if row["data"] is not None else Path(row["path"]).read_bytes()
        image = ImageData.of(data)
        row["data"], row["sha256"] = data, image.sha256
        # The same captions whoever makes them, and when.
        seed = seed_of("annotate", self.seed, row["id"]) % 2**31
        return [Ask(self.prompt, image=image, n=self.captions, seed=seed)]

    def take(self, row: Row, answers: Sequence[tuple[Text, ...]]) -> Row:
        """
        Raises:
            ValueError: a caption is empty.
        """
        (texts,) = answers
        if not all(text.text for text in texts):
            raise ValueError("the captioner wrote nothing")
        return {
            "captions": [text.text for text in texts],
            "finish": [text.finish.value for text in texts],
            "tokens": [text.tokens for text in texts],
        }


class _Annotation:
    """One start of the job."""

    def __init__(self, config: Config, folder: Path, shards: Shards, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._shards = shards
        self._console = console
        self._problems: Counter[str] = Counter()

    def whole(self, done: Done) -> int:
        """Images that have no caption."""
        config, began = self._config, time.time()
        images = open_images(config.data.images)
        rows = images.rows
        if len(done):
            rows = rows.map_batches(_without, fn_args=(done,), batch_format="pyarrow")
        left = None if images.total is None else max(0, images.total - len(done))
        what = Captioned(config.data.prompt, config.annotate.captions, config.seed)
        captioned = through(
            rows, config.captioner, "captioner", config.seed, what.asks, what.take, self._shards.schema
        )
        with Counting("images", left, self._console) as counting:
            try:
                self._write(captioned.iter_batches(batch_size=None, batch_format="pyarrow"), counting)
            finally:
                self._shards.flush()
                self._conclude(counting, len(done), time.time() - began)
        return counting.failed

    def _write(self, batches: Iterable[pa.Table], counting: Counting) -> None:
        seen: set[str] = set()
        with (self._folder / FAILURES).open("w", encoding="utf-8") as failures:
            for batch in batches:
                for row in batch.to_pylist():
                    problem = row["problem"]
                    if not problem and row["id"] in seen:
                        problem = "another row has this id"
                    if problem:
                        failures.write(
                            json.dumps({"id": row["id"], "path": row["path"], "problem": problem}) + "\n"
                        )
                        self._problems[problem] += 1
                    else:
                        seen.add(row["id"])
                        self._shards.add(self._output(row))
                    counting.count(1, bool(problem))
                failures.flush()

    def _output(self, row: Row) -> dict[str, Any]:
        kept = {name: value for name, value in row.items() if name != "problem"}
        return {**kept, "prompt": self._config.data.prompt}

    def _conclude(self, counting: Counting, before: int, seconds: float) -> None:
        made = counting.done - counting.failed
        result = {
            "captioned": before + made,
            "captioned_now": made,
            "failed": counting.failed,
            "problems": dict(self._problems.most_common(20)),
            "seconds": seconds,
            "images_per_s": counting.done / seconds,
        }
        (self._folder / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        failed = f", {counting.failed} failed ({self._folder / FAILURES})" if counting.failed else ""
        self._console.print(
            f"{before + made} images captioned{failed}: {self._folder / CAPTIONS}",
            markup=False,
            soft_wrap=True,
        )


def _without(table: pa.Table, done: Done) -> pa.Table:
    """The rows that are not done."""
    return table.filter(pa.array(~done.has(table["id"].to_pylist())))
