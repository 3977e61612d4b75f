"""Writes easy-VQA (PyPI: easy-vqa, MIT licence; 5,000 images of one shape each) as files that the jobs read.

    pip install easy-vqa
    python tools/get_easy_vqa.py OUT [--split test] [--images 200]

OUT/images/ holds the images, OUT/questions.json the questions in Prism's form (prism.benchmark=custom), and
OUT/questions.parquet the same as CapRL-QA data: the options of a question are all answers of its kind
(shapes, colours, yes and no).
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.curation.rows import CURATED

SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")


def options(answer: str, every: list[str]) -> list[str]:
    """All answers of the same kind."""
    for kind in (YES_NO, SHAPES):
        if answer in kind:
            return list(kind)
    return [one for one in every if one not in (*YES_NO, *SHAPES)]


def row(image_id: int, path: Path, asked: list[tuple[str, str]], every: list[str]) -> dict[str, Any]:
    """One image as CapRL-QA data."""
    truths = []
    for question, answer in asked:
        choices = options(answer, every)
        letters = string.ascii_uppercase[: len(choices)]
        truths.append(
            {
                "question": question,
                "choices": [f"{letter}) {text}" for letter, text in zip(letters, choices, strict=True)],
                "answer": letters[choices.index(answer)],
            }
        )
    return {
        "id": f"easy-vqa/{image_id}",
        "image": {"bytes": path.read_bytes(), "path": None},
        "prompt": [{"role": "user", "content": "<image> Please describe this image in detail."}],
        "data_source": "image_caption_rl",
        "reward_model": {"ground_truth": truths},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=["train", "test"], default="test")
    parser.add_argument("--images", type=int, default=0, help="the first so many; 0: all")
    args = parser.parse_args()
    try:
        import easy_vqa
    except ImportError:
        sys.exit("get_easy_vqa.py: the data set is not installed: pip install easy-vqa")
    questions = getattr(easy_vqa, f"get_{args.split}_questions")()
    paths = getattr(easy_vqa, f"get_{args.split}_image_paths")()
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(*questions, strict=True):
        by_image[image_id].append((question, answer))
    chosen = sorted(by_image)[: args.images or None]

    (args.out / "images").mkdir(parents=True, exist_ok=True)
    for image_id in chosen:
        shutil.copy(paths[image_id], args.out / "images" / f"{image_id}.png")
    every = easy_vqa.get_answers()
    prompted = [
        {"image": f"images/{image_id}.png", "prompt": question, "answer": answer}
        for image_id in chosen
        for question, answer in by_image[image_id]
    ]
    (args.out / "questions.json").write_text(json.dumps(prompted, indent=1) + "\n", encoding="utf-8")
    rows = [row(image_id, Path(paths[image_id]), by_image[image_id], every) for image_id in chosen]
    pq.write_table(pa.Table.from_pylist(rows, schema=CURATED), args.out / "questions.parquet")
    print(f"{len(chosen)} images, {len(prompted)} questions: {args.out}")


if __name__ == "__main__":
    main()
