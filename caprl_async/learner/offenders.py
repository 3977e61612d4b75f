"""What a step that stopped leaves behind: the captions whose numbers were not finite."""

from __future__ import annotations

from pathlib import Path

import msgspec

from caprl_async.learner.batch import NotFinite, caption_name
from caprl_async.types import TrainBatch


def save_offenders(path: Path, batch: TrainBatch, error: NotFinite) -> None:
    """Writes the message and the named captions with all that the learner got of them, as JSON.

    NaN and infinity are written as null.
    """
    wanted = set(error.captions)
    captions = [
        {
            "name": name,
            "row_id": scored.row_id,
            "image": scored.image.path,
            "reward": parts,
            "caption": caption,
        }
        for scored in batch.groups
        for i, (caption, parts) in enumerate(zip(scored.group.captions, scored.rewards, strict=True))
        if (name := caption_name(scored.group, i)) in wanted
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"version": str(batch.version), "error": str(error), "captions": captions}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
