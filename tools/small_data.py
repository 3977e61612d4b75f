"""Data of the tiny world that tools/reproduce_small.py trains on beside what the package ships."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from caprl_async.tiny.pretrain import caption_for
from caprl_async.tiny.world import image_bytes, sample_world, write_parquet

_LETTERS = "ABCDEFGH"


def write_captions(path: Path, kind: str, count: int, seed: int) -> None:
    """Fresh images, the same for each kind, with `sparse` or `dense` captions."""
    rows = []
    for number in range(count):
        world = sample_world(random.Random(f"images-{seed}-{number}"))
        caption = caption_for(kind, world, random.Random(f"{kind}-{seed}-{number}"))
        image = {"bytes": image_bytes(world), "path": None}
        rows.append({"id": f"{number:05d}", "image": image, "caption": caption})
    write_parquet(rows, path)


def write_unfiltered(source: Path, path: Path, share: float, seed: int) -> None:
    """The questions of `source` as no filter has seen them: so many have a wrong answer."""
    rng = random.Random(seed)
    rows = pq.read_table(source).to_pylist()
    for row in rows:
        for question in row["reward_model"]["ground_truth"]:
            if rng.random() < share:
                wrong = [x for x in _LETTERS[: len(question["choices"])] if x != question["answer"]]
                question["answer"] = rng.choice(wrong)
    write_parquet(rows, path)


def write_answers(source: Path, path: Path, images: int) -> None:
    """The questions about the first images of `source`, each to be answered in words from the image."""
    rows: list[dict[str, Any]] = []
    for row in pq.read_table(source).slice(0, images).to_pylist():
        for number, question in enumerate(row["reward_model"]["ground_truth"]):
            answer = question["choices"][_LETTERS.index(question["answer"])].partition(") ")[2]
            name = f"{row['id']}-{number}"
            rows.append({"id": name, "image": row["image"], "prompt": question["question"], "answer": answer})
    write_parquet(rows, path)
