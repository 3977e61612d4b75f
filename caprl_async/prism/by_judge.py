"""CapRL-QA questions, asked by the judge that the training has: probabilities instead of written answers."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.load import load_rows
from caprl_async.data.rows import DataError, Reject
from caprl_async.data.video import keep_row
from caprl_async.prism.captions import Captions
from caprl_async.prism.passes import Passes
from caprl_async.prism.told import Told
from caprl_async.stream.judging import judged_row
from caprl_async.types import ImageRef, Question


@dataclass(frozen=True)
class Asked:
    """One image with its questions."""

    row_id: str
    image: ImageRef
    questions: tuple[Question, ...]
    reference: str | None  # a caption that says everything, if the data has one

    def items(self, abstain: str) -> list[Item]:
        """The questions as a benchmark's; the last option of each is `abstain`."""
        return [
            Item(
                item_id=f"{self.row_id}/{position}",
                images=(self.image,),
                question=question.stem,
                golds=(_letter(question),),
                rule=Rule.CHOICE,
                options=(*question.choices, abstain),
                category=question.kind.value,
                abstain=True,
            )
            for position, question in enumerate(self.questions)
        ]


def load_asked(path: Path, store: ImageStore, abstain: str, limit: int) -> tuple[list[Asked], list[Reject]]:
    """The rows of a data file (docs/judge.md) up to `limit` questions (0: all); their images go into `store`.

    Raises:
        DataError: the file cannot be used.
    """
    data = load_rows(path, abstain)
    rejects, found, left = list(data.rejects), [], limit or sum(len(row.questions) for row in data)
    for row in data:
        questions = row.questions[: max(left, 0)]
        left -= len(questions)
        if not questions:
            break
        try:
            found.append(Asked(row.row_id, keep_row(store, row, None), questions, row.reference_caption))
        except BadImage as bad:
            rejects.append(Reject(row.row_id, None, "bad_image", str(bad), "image"))
    if not found:
        raise DataError(f"{path}: no row whose image can be read")
    return found, rejects


def ask(rows: Sequence[Asked], captions: Captions, passes: Passes, missing: list[str]) -> dict[str, Told]:
    """Has `judge` answer from each caption, from the reference caption and from none; ids of items whose
    image has no caption are added to `missing`."""
    own = {row.row_id: captions.get(row.image.sha256) or captions.get(row.row_id) or () for row in rows}
    asked = []
    for row in rows:
        texts = [caption.text for caption in own[row.row_id]]
        if not texts:
            missing += [f"{row.row_id}/{position}" for position in range(len(row.questions))]
            continue
        asked.append(judged_row(row.row_id, [*texts, *filter(None, [row.reference]), ""], row.questions))
    verdicts = passes.verdicts(asked)
    return {
        f"{row.row_id}/{position}": _told(verdicts[row.row_id], position, len(own[row.row_id]))
        for row in rows
        if row.row_id in verdicts
        for position in range(len(row.questions))
    }


def _told(verdicts: dict[str, Any], position: int, captions: int) -> Told:
    def of(name: str) -> list[Any]:
        return [one[position] for one in verdicts[name]]

    scores = of("scores")
    return Told(
        answers=[chosen or "" for chosen in of("chosen")[:captions]],
        scores=scores[:captions],
        abstained=of("abstained")[:captions],
        blind=scores[-1],
        ceiling=scores[captions] if len(scores) > captions + 1 else None,
    )


def _letter(question: Question) -> str:
    return string.ascii_uppercase[len(question.choices) if question.answer is None else question.answer]
