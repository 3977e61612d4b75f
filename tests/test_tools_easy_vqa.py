"""A data set that others made and published goes through the loaders without a reject."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from caprl_async.benchmarks.items import Rule
from caprl_async.benchmarks.load import load_items
from caprl_async.benchmarks.scorers import score
from caprl_async.data.images import ImageStore
from caprl_async.data.load import load_rows


def test_easy_vqa_in_both_forms(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "tools/get_easy_vqa.py", str(tmp_path), "--images", "20"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert made.stdout.startswith("20 images, ")
    found = load_items("custom", tmp_path / "questions.json", ImageStore(tmp_path / "store"))
    assert found.rejects == ()
    assert {item.rule for item in found.items} == {Rule.EXACT}
    assert len({item.images[0].sha256 for item in found.items}) == 20
    assert score("It is \\boxed{Triangle}.", found.items[0]) == 1

    rows = load_rows(tmp_path / "questions.parquet", "unknown")
    assert rows.rejects == ()
    assert len(rows) == 20
    asked = [question for row in rows for question in row.questions]
    assert len(asked) == len(found.items)
    kinds = {question.choices for question in asked}
    assert {len(choices) for choices in kinds} == {2, 3, 8}
    right = [question.choices[question.answer] for question in asked if question.answer is not None]
    assert right == [item.golds[0] for item in found.items]
