"""An evaluation's passes of rows through models, each into a folder of its own, each resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from caprl_async.benchmarks.items import Item
from caprl_async.config import Config, WriterConfig
from caprl_async.prism.captions import Captions
from caprl_async.stream.captioning import CAPTIONS, Captioned, about_captions
from caprl_async.stream.captions import Caption, read_captions
from caprl_async.stream.judging import JUDGED, about_judge, judged_as, judging
from caprl_async.stream.pipeline import FAILURES, run_pass
from caprl_async.stream.shards import CAPTIONED, Parquet
from caprl_async.stream.sources import listed, table_of
from caprl_async.stream.stage import Row, asking, explained
from caprl_async.stream.texts import ANSWERED, Texts, asked_as, rows_of
from caprl_async.types import Finish
from caprl_async.writer.writer import about_writer

VERDICTS = "verdicts"
_ROWS = 2000  # of an output file


class Passes:
    """The passes of one run folder."""

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._console = console

    def captions(self, items: Sequence[Item]) -> Captions:
        """Of the items' images: made by `captioner`, or read from `prism.captions_from`.

        Raises:
            ConfError, RingFailed: see `stage.explained`.
        """
        prism, config = self._config.prism, self._config
        if prism.captions_from:
            with explained():
                return read_captions(Path(prism.captions_from))
        images = {image.sha256: image for item in items for image in item.images}
        # To write nothing is an answer, and a bad one: left out, it would make the captioner look better.
        what = Captioned(config.data.prompt, prism.captions, config.seed, empty=True)
        shards = self._shards(CAPTIONS, about_captions(config, prism.captions), CAPTIONED)
        stage = asking(config.captioner, "captioner", config.seed, what, CAPTIONED)
        self._run(listed(images.values()), len(images), stage, shards, "images")
        return {row["sha256"]: _captions(row) for row in shards.read()}

    def answers(
        self, name: str, what: str, model: WriterConfig, key: str, prompts: Mapping[str, Sequence[str]]
    ) -> dict[str, Sequence[str]]:  # fmt: skip
        """id -> what the model wrote to each of its prompts; ids that it did not answer are not in it."""
        if not prompts:
            return {}
        names = {asked_as(item_id, list(texts)): item_id for item_id, texts in prompts.items()}
        shards = self._shards(name, about_writer(model), ANSWERED)
        stage = asking(model, key, self._config.seed, Texts(self._config.seed), ANSWERED)
        rows = rows_of({name: prompts[item_id] for name, item_id in names.items()})
        self._run(rows, len(names), stage, shards, what)
        return {item_id: row["answers"] for item_id, row in shards.named(names).items()}

    def verdicts(self, rows: Sequence[Row]) -> dict[str, Row]:
        """id -> its row of JUDGED, of rows made by `judged_row`."""
        if not rows:
            return {}
        judge = self._config.judge
        shards = self._shards(VERDICTS, about_judge(judge), JUDGED)
        asked = [judged_as(row) for row in rows]
        names = {one["id"]: row["id"] for one, row in zip(asked, rows, strict=True)}
        stage = judging(judge, self._config.seed, self._config.ring.gpus_per_judge)
        self._run(table_of(asked), len(rows), stage, shards, "images judged")
        return shards.named(names)

    def _shards(self, name: str, about: Mapping[str, Any], schema: pa.Schema) -> Parquet:
        with explained():
            return Parquet(self._folder / name, name, _ROWS, about, schema)

    def _run(self, rows: Any, total: int, stage: Any, shards: Parquet, what: str) -> None:
        run_pass(rows, total, stage, shards, shards.folder / FAILURES, self._console, what=what)


def _captions(row: Row) -> list[Caption]:
    pairs = zip(row["captions"], row["finish"], strict=True)
    return [Caption(text, finish == Finish.LENGTH.value) for text, finish in pairs]
