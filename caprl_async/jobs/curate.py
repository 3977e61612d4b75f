"""Images become questions: written by `questioner`, answered with the image and without, filtered.

Passes, each resumable: questions are written (or read from `curate.questions_from`); `checker` answers each
in several orders of its options, with the image and without; `judge` does so from a row's own caption, and
from none where there is no checker. What is kept is a CapRL-QA parquet data set with a data card.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.curation.card import Card, Example, write_card
from caprl_async.curation.checks import Accuracy, is_right, orders, prompt, refusal
from caprl_async.curation.near import hash_of
from caprl_async.curation.rows import CURATED, WRITTEN, Candidate, as_row, distinct, given, written
from caprl_async.curation.written import FORM
from caprl_async.data.images import ImageStore, image_folder
from caprl_async.data.load import load_rows
from caprl_async.data.processor import UnreadableImage
from caprl_async.data.rows import Reject, append_rejects
from caprl_async.jobs.annotate import SOME_FAILED
from caprl_async.ring.errors import RingFailed
from caprl_async.stream import on_ray
from caprl_async.stream.judging import (
    JUDGED,
    about_judge,
    judged_as,
    judged_row,
    judging,
    questions_of,
    questions_text,
)
from caprl_async.stream.pipeline import FAILURES, run_pass
from caprl_async.stream.shards import Parquet
from caprl_async.stream.sources import image_of, open_images, table_of
from caprl_async.stream.stage import Row, asking, explained
from caprl_async.stream.texts import asked_as
from caprl_async.types import ImageRef, Question
from caprl_async.writer.types import Ask, Text
from caprl_async.writer.writer import about_writer, model_name

QUESTIONS = "questions"
REJECTS = "rejects.jsonl"
_WRITTEN, _CHECKED, _JUDGED = "written", "checked", "judged"
_EXAMPLES = 12

CHECKED = pa.schema(
    [
        ("id", pa.string()),
        ("problem", pa.string()),
        ("with_image", pa.list_(pa.float64())),
        ("without_image", pa.list_(pa.float64())),
    ]
)
"""Columns of what a checker answered: shares of right answers, a value per question."""


def run(config: Config) -> None:
    """
    Raises:
        ConfError: the source cannot be read, or the folder holds another job.
        RingFailed: a model could not be started or answers no more, or no question is kept.
        SystemExit: with 3, if all is through and some images could not be asked about.
    """
    console = Console(stderr=True)
    with conf.run_folder(config) as folder:
        job = _Curation(config, folder, console)
        with on_ray(config):
            job.whole()
    if job.failed:
        sys.exit(SOME_FAILED)


@dataclasses.dataclass(frozen=True)
class Writing:
    """Asks a questioner about an image, which goes into the store."""

    prompt: str
    folder: str

    def asks(self, row: Row) -> Sequence[Ask]:
        """
        Raises:
            BadImage, OSError: the image cannot be read.
        """
        image = image_of(row)
        path = ImageStore(self.folder).put(image.data).path
        row |= {"sha256": image.sha256, "path": path, "phash": f"{hash_of(image):016x}"}
        return [Ask(self.prompt, image=image)]

    def take(self, row: Row, answers: Sequence[tuple[Text, ...]]) -> Row:
        return {"written": answers[0][0].text}


@dataclasses.dataclass(frozen=True)
class Checking:
    """Asks a checker each question of an image, with it and without."""

    permutations: int

    def asks(self, row: Row) -> Sequence[Ask]:
        image = ImageRef(sha256=row["sha256"], path=row["path"])
        return [
            Ask(prompt(question, order, seen), image=image if seen else None)
            for question, order, seen in self._asked(row)
        ]

    def take(self, row: Row, answers: Sequence[tuple[Text, ...]]) -> Row:
        right: dict[tuple[str, bool], list[bool]] = {}
        for (question, order, seen), (text,) in zip(self._asked(row), answers, strict=True):
            right.setdefault((question.question_id, seen), []).append(
                is_right(question, order, seen, text.text)
            )
        shares = {key: sum(found) / len(found) for key, found in right.items()}
        ids = [question.question_id for question in questions_of(row)]
        return {
            "with_image": [shares[one, True] for one in ids],
            "without_image": [shares[one, False] for one in ids],
        }

    def _asked(self, row: Row) -> Iterator[tuple[Question, tuple[int, ...], bool]]:
        questions = questions_of(row)
        for question, made in zip(questions, orders(questions, self.permutations), strict=True):
            for order in made:
                yield question, order, True
                yield question, order, False


class _Curation:
    """One start of the job."""

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._images = image_folder(config, folder)
        self._has_checker = bool(config.checker.model or config.checker.endpoint.url)
        self._has_judge = bool(config.judge.model or config.judge.endpoint.url)
        self.failed = 0
        self._came = 0  # images that there were

    def whole(self) -> None:
        """Everything."""
        with explained():
            candidates, rejects = self._candidates()
        found = self._accuracies(candidates)
        card = self._keep(candidates, rejects, found)
        write_card(card, self._folder)
        told = f"{card.questions_kept} questions about {card.images_kept} images kept, of {card.questions}"
        failed = f", {self.failed} images could not be asked about" if self.failed else ""
        self._console.print(f"{told}{failed}: {self._folder / QUESTIONS}", markup=False, soft_wrap=True)
        if not card.questions_kept:
            left = card.questions_left_out + card.images_left_out
            why = ", ".join(f"{number} {reason}" for reason, number in left.most_common(5))
            raise RingFailed(f"no question is kept: {why}")

    # ------------------------------------------------------------ questions

    def _candidates(self) -> tuple[list[Candidate], list[Reject]]:
        config = self._config
        if config.curate.questions_from:
            rows = load_rows(config.curate.questions_from, config.judge.prompt.abstain)
            self._came = len(rows) + len({one.row_id for one in rows.rejects if one.question is None})
            every = given(rows, ImageStore(self._images))
        else:
            texts = list(self._written())
            self._came = len(texts)
            every = written(iter(texts), config.judge.prompt.abstain)
        candidates: list[Candidate] = []
        rejects: list[Reject] = []
        for one in distinct(every, config.curate.near, self._excluded()):
            if isinstance(one, Reject):
                rejects.append(one)
            else:
                candidates.append(one)
        return candidates, rejects

    def _written(self) -> Iterator[Mapping[str, Any]]:
        config, curate = self._config, self._config.curate
        text = (curate.prompt or FORM).replace("{n}", str(curate.questions))
        images = open_images(config.data.images)
        shards = self._shards(
            _WRITTEN,
            {**about_writer(config.questioner), "prompt": text, "source": config.data.images},
            WRITTEN,
        )
        stage = asking(
            config.questioner, "questioner", config.seed, Writing(text, str(self._images)), WRITTEN
        )
        self._pass(images.rows, images.total, stage, shards, "images asked about")
        return shards.read()

    def _excluded(self) -> list[int]:
        if not self._config.curate.exclude or self._config.curate.near < 0:
            return []
        rows = open_images(self._config.curate.exclude).rows.map(_hashed).take_all()
        return [int(row["phash"], 16) for row in rows if row["phash"]]

    # ------------------------------------------------------------ answers

    def _accuracies(self, candidates: Sequence[Candidate]) -> dict[str, list[Accuracy | None]]:
        """row id -> of each question; None: the judge gave no score. Rows that could not be asked are not in
        it."""
        checked = self._checked(candidates) if self._has_checker else {}
        judged = self._judged(candidates) if self._has_judge else {}
        found: dict[str, list[Accuracy | None]] = {}
        for one in candidates:
            seen, told = checked.get(one.row_id), judged.get(one.row_id)
            if (self._has_checker and seen is None) or (self._has_judge and told is None):
                continue
            without = seen["without_image"] if seen else (told or [[]])[-1]
            with_caption = told[0] if told and one.caption else [None] * len(one.questions)
            with_image = seen["with_image"] if seen else [None] * len(one.questions)
            asked_so = bool(told and one.caption)
            found[one.row_id] = [
                _accuracy(*each, asked_so) for each in zip(with_image, without, with_caption, strict=True)
            ]
        return found

    def _checked(self, candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
        config = self._config
        about = {**about_writer(config.checker), "permutations": config.curate.permutations}
        shards = self._shards(_CHECKED, about, CHECKED)
        rows = [_asked_row(one) for one in candidates]
        names = {row["id"]: one.row_id for row, one in zip(rows, candidates, strict=True)}
        work = Checking(config.curate.permutations)
        stage = asking(config.checker, "checker", config.seed, work, CHECKED)
        self._pass(table_of(rows), len(rows), stage, shards, "images checked")
        return shards.named(names)

    def _judged(self, candidates: Sequence[Candidate]) -> dict[str, list[list[float | None]]]:
        """Scores [caption][question]; the last caption is empty."""
        judge = dataclasses.replace(self._config.judge, permutations=self._config.curate.permutations)
        shards = self._shards(_JUDGED, about_judge(judge), JUDGED)
        rows = [
            judged_as(judged_row(one.row_id, [*filter(None, [one.caption]), ""], one.questions))
            for one in candidates
        ]
        names = {row["id"]: one.row_id for row, one in zip(rows, candidates, strict=True)}
        stage = judging(judge, self._config.seed, self._config.ring.gpus_per_judge)
        self._pass(table_of(rows), len(rows), stage, shards, "images judged")
        return {row_id: row["scores"] for row_id, row in shards.named(names).items()}

    # ------------------------------------------------------------ the result

    def _keep(
        self,
        candidates: Sequence[Candidate],
        rejects: Sequence[Reject],
        found: Mapping[str, list[Accuracy | None]],
    ) -> Card:
        config, folder = self._config, self._folder / QUESTIONS
        shutil.rmtree(folder, ignore_errors=True)  # made anew from what the passes have left
        card = Card(
            self._about(),
            images=self._came,
            images_left_out=Counter(one.reason for one in rejects if one.question is None),
            questions_left_out=Counter(one.reason for one in rejects if one.question is not None),
        )
        shards = Parquet(folder, QUESTIONS, config.curate.rows_per_file, card.about, CURATED)
        out = list(rejects)
        for one in candidates:
            accuracies = found.get(one.row_id)
            card.questions += len(one.questions)
            if accuracies is None:
                out.append(Reject(one.row_id, None, "not_asked", "see failures.jsonl"))
                card.questions_left_out["not_asked"] += len(one.questions)
                continue
            card.accuracies += filter(None, accuracies)
            kept = []
            for question, accuracy in zip(one.questions, accuracies, strict=True):
                if reason := refusal(accuracy, config.curate) if accuracy else "not_scored":
                    card.questions_left_out[reason] += 1
                    position = int(question.question_id.rpartition("/")[2])  # in its row
                    out.append(Reject(one.row_id, position, reason, f"{question.stem} {accuracy}"))
                else:
                    kept.append(question)
            if kept:
                shards.add(as_row(one, kept, config.data.prompt))
                card.images_kept += 1
                card.questions_kept += len(kept)
                if len(card.examples) < _EXAMPLES:
                    card.examples.append(Example(one.image.path, kept))
        shards.flush()
        (self._folder / REJECTS).unlink(missing_ok=True)
        append_rejects(self._folder / REJECTS, Path(self._source()), out)
        return card

    def _about(self) -> dict[str, Any]:
        config, curate = self._config, self._config.curate
        return {
            "source": self._source(),
            "questioner": model_name(config.questioner),
            "checker": model_name(config.checker),
            "judge": config.judge.endpoint.url or config.judge.model,
            "permutations": curate.permutations,
            "with_image_above": curate.with_image_above,
            "without_image_below": curate.without_image_below,
            "with_caption_above": curate.with_caption_above,
            "near": curate.near,
            "exclude": curate.exclude,
            "seed": config.seed,
        }

    def _source(self) -> str:
        return self._config.curate.questions_from or self._config.data.images

    def _shards(self, name: str, about: Mapping[str, Any], schema: pa.Schema) -> Parquet:
        with explained():
            return Parquet(self._folder / name, name, 2000, about, schema)

    def _pass(self, rows: Any, total: int | None, stage: Any, shards: Parquet, what: str) -> None:
        failures = shards.folder / FAILURES
        self.failed += run_pass(rows, total, stage, shards, failures, self._console, what=what).failed


def _accuracy(
    with_image: float | None, without: float | None, with_caption: float | None, captioned: bool
) -> Accuracy | None:
    """None where the judge, which was asked, gave no score."""
    if without is None or (captioned and with_caption is None):
        return None
    return Accuracy(with_image, without, with_caption)


def _asked_row(one: Candidate) -> Row:
    asked = questions_text(one.questions)
    return {
        "id": asked_as(one.row_id, one.image.sha256, asked),
        "problem": None,
        "sha256": one.image.sha256,
        "path": one.image.path,
        "questions": asked,
    }


def _hashed(row: Row) -> Row:
    """The perceptual hash of an image to exclude; empty where it cannot be read, as nothing looks like it."""
    try:
        return {"phash": f"{hash_of(image_of(row)):016x}"}
    except (UnreadableImage, OSError, TypeError):
        return {"phash": ""}
