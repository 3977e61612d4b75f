"""Captions with their questions and verdicts, for people: a few groups of each batch in `samples.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caprl_async.replay.lives import Cut
from caprl_async.types import Question, ScoredGroup


def append_samples(path: Path, cut: Cut, groups: int) -> None:
    """Appends the first `groups` groups of a batch, one JSON object per line."""
    if groups <= 0:
        return
    step = cut.batch.version.step
    with path.open("a", encoding="utf-8") as out:
        for scored, questions in zip(cut.batch.groups[:groups], cut.questions, strict=False):
            out.write(json.dumps(sample(step, scored, questions), ensure_ascii=False) + "\n")


def sample(step: int, scored: ScoredGroup, questions: tuple[Question, ...]) -> dict[str, Any]:
    """One group as plain data; `scores` and `choice` have one entry per caption."""
    captions = [
        {
            "text": caption.text,
            "tokens": len(caption.token_ids),
            "reward": parts.total,
            "accuracy": parts.accuracy,
            "length": parts.length,
            "versions": sorted({str(span.version) for span in caption.spans}),
        }
        for caption, parts in zip(scored.group.captions, scored.rewards, strict=True)
    ]
    asked = [
        {
            "stem": question.stem,
            "choices": list(question.choices),
            "answer": question.answer,
            "kind": question.kind.value,
            "scores": [row[position].score for row in scored.verdicts],
            "choice": [row[position].choice for row in scored.verdicts],
        }
        for position, question in enumerate(questions)
    ]
    return {
        "step": step,
        "key": scored.group.key,
        "row_id": scored.row_id,
        "image": scored.image.path,
        "captions": captions,
        "questions": asked,
    }
