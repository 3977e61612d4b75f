"""What is kept of each batch: some groups with questions and verdicts for people, or all of it to replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caprl_async.replay.lives import Cut
from caprl_async.replay.transport import decode_hub
from caprl_async.reward.reward import TERMS
from caprl_async.types import BatchReply, Question, ScoredGroup, TrainBatch, Version


def batch_path(folder: Path, version: Version) -> Path:
    """The file of the batch that was cut at a version; names sort by version."""
    return folder / f"{version.epoch:03d}-{version.step:06d}.msgpack"


def record_batch(folder: Path, cut: Cut) -> None:
    """Keeps a batch as the learner gets it, at `batch_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = batch_path(folder, cut.batch.version)
    partial = path.with_suffix(".partial")
    partial.write_bytes(cut.reply)
    partial.replace(path)


def recorded_batch(path: Path) -> TrainBatch:
    """What `record_batch` kept.

    Raises:
        ValueError: the file holds no batch.
    """
    reply = decode_hub(path.read_bytes())
    if not isinstance(reply, BatchReply) or reply.batch is None:
        raise ValueError(f"{path} holds no recorded batch")
    return reply.batch


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
            **{term: getattr(parts, term) for term in TERMS},
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
