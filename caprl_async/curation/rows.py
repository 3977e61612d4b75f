"""Images with their questions on the way, and as rows of the CapRL-QA form."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from caprl_async.curation.near import Near, hash_of
from caprl_async.curation.written import parse
from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.rows import Dataset, Reject
from caprl_async.data.video import keep_row
from caprl_async.types import ImageRef, Question

CURATED = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("data_source", pa.string()),
        ("reference_caption", pa.string()),
        ("facts", pa.string()),
        (
            "reward_model",
            pa.struct(
                [
                    (
                        "ground_truth",
                        pa.list_(
                            pa.struct(
                                [
                                    ("question", pa.string()),
                                    ("choices", pa.list_(pa.string())),
                                    ("answer", pa.string()),
                                    ("weight", pa.float64()),
                                ]
                            )
                        ),
                    )
                ]
            ),
        ),
    ]
)
"""Columns of what is kept: those of CapRL-QA-75K, and what else the rows of `curate.questions_from` held."""

WRITTEN = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("problem", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("written", pa.string()),
    ]
)
"""Columns of what a questioner wrote; `path` is the image's in the store."""


@dataclass(frozen=True)
class Candidate:
    """One image with the questions that may be kept."""

    row_id: str
    image: ImageRef
    phash: int
    questions: tuple[Question, ...]
    caption: str | None = None
    facts: str | None = None
    prompt: str = ""  # its own


def written(rows: Iterator[Mapping[str, Any]], abstain: str) -> Iterator[Candidate | Reject]:
    """The questions that a questioner wrote, from rows of WRITTEN."""
    for row in rows:
        found = parse(row["written"], row["id"], abstain)
        yield from found.rejects
        if found.questions:
            image = ImageRef(sha256=row["sha256"], path=row["path"])
            yield Candidate(row["id"], image, int(row["phash"], 16), found.questions)


def given(rows: Dataset, store: ImageStore) -> Iterator[Candidate | Reject]:
    """The questions of a data file; those about what is absent are not checked here and left out."""
    yield from rows.rejects
    for row in rows:
        try:
            image = keep_row(store, row, None)
        except BadImage as bad:
            yield Reject(row.row_id, None, "bad_image", str(bad), "image")
            continue
        asked = tuple(question for question in row.questions if question.answer is not None)
        yield from (
            Reject(row.row_id, int(question.question_id.rpartition("/")[2]), "about_what_is_absent")
            for question in row.questions
            if question.answer is None
        )
        if asked:
            phash = hash_of(image)
            caption, facts = row.reference_caption, row.facts
            yield Candidate(row.row_id, image, phash, asked, caption, facts, row.prompt)


def distinct(
    found: Iterator[Candidate | Reject], near: int, excluded: Sequence[int]
) -> Iterator[Candidate | Reject]:
    """Each image once: the first of those that are equal or look alike; none that looks like an excluded."""
    seen: set[str] = set()
    alike = Near(max(near, 0))
    out = Near(max(near, 0), excluded)
    for one in found:
        if isinstance(one, Reject):
            yield one
        elif one.image.sha256 in seen:
            yield Reject(one.row_id, None, "duplicate_image", one.image.sha256)
        elif near >= 0 and out.find(one.phash) is not None:
            yield Reject(one.row_id, None, "excluded_image", f"{one.phash:016x}")
        elif near >= 0 and alike.find(one.phash) is not None:
            yield Reject(one.row_id, None, "near_duplicate_image", f"{one.phash:016x}")
        else:
            seen.add(one.image.sha256)
            alike.add(one.phash)
            yield one


def as_row(candidate: Candidate, questions: Sequence[Question], prompt: str) -> dict[str, Any]:
    """A row of CURATED with these of the candidate's questions; an empty prompt leaves it its own."""
    return {
        "id": candidate.row_id,
        "image": {"bytes": Path(candidate.image.path).read_bytes(), "path": None},
        "prompt": [{"role": "user", "content": f"<image> {prompt or candidate.prompt}"}],
        "data_source": "image_caption_rl",
        "reference_caption": candidate.caption,
        "facts": candidate.facts,
        "reward_model": {"ground_truth": [_truth(question) for question in questions]},
    }


def _truth(question: Question) -> dict[str, Any]:
    letters = string.ascii_uppercase
    assert question.answer is not None
    return {
        "question": question.stem,
        "choices": [f"{letter}) {text}" for letter, text in zip(letters, question.choices, strict=False)],
        "answer": letters[question.answer],
        "weight": question.weight,
    }
