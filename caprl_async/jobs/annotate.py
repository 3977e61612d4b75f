"""A captioner over any number of images: `data.images` in, a data set of captions out, each image once.

A row that has no caption is in `failures.jsonl` with the reason; `resume=true` tries it again, and goes on
after whatever has ended the job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.files import write_json
from caprl_async.stream import on_ray
from caprl_async.stream.captioning import CAPTIONS, Captioned, about_captions
from caprl_async.stream.pipeline import FAILURES, Passed, run_pass
from caprl_async.stream.shards import FORMS
from caprl_async.stream.sources import open_images
from caprl_async.stream.stage import asking, explained

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
    annotate, what = config.annotate, Captioned(config.data.prompt, config.annotate.captions, config.seed)
    with conf.run_folder(config) as folder:
        with explained():
            form = FORMS[annotate.form]
            shards = form(
                folder / CAPTIONS, CAPTIONS, annotate.rows_per_file, about_captions(config, annotate.captions)
            )
        with on_ray(config):
            with explained():
                images = open_images(config.data.images)
            passed = run_pass(
                images.rows,
                images.total,
                asking(config.captioner, "captioner", config.seed, what, shards.schema),
                shards,
                folder / FAILURES,
                console,
                what="images",
            )
        _conclude(passed, folder, console)
    if passed.failed:
        sys.exit(SOME_FAILED)


def _conclude(passed: Passed, folder: Path, console: Console) -> None:
    result = {
        "captioned": passed.before + passed.made,
        "captioned_now": passed.made,
        "failed": passed.failed,
        "problems": dict(passed.problems.most_common(20)),
        "images_per_s": passed.rows_per_s,
    }
    write_json(folder / RESULT, result)
    failed = f", {passed.failed} failed ({folder / FAILURES})" if passed.failed else ""
    told = f"{result['captioned']} images captioned{failed}: {folder / CAPTIONS}"
    console.print(told, markup=False, soft_wrap=True)
