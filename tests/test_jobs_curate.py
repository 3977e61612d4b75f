"""The job that makes questions, as a user meets it: planted leaks and wrong answers must be found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from endpoint_kit import FakeServer, Tokens, serving
from PIL import Image

from caprl_async.data.load import load_rows
from caprl_async.run import main

ABSTAIN = "Can not answer based on the caption"
GOOD, LEAKY, WRONG = (
    "What colour is the circle?",
    "What colour is the blue sky?",
    "How many legs has the cat?",
)
WRITTEN = f"""\
#### 1. **{GOOD}**
   - A) red
   - B) green
   - C) grey
**Answer:** A) red
------
#### 2. **{LEAKY}**
   - A) black
   - B) blue
   - C) pink
**Answer:** B) blue
------
#### 3. **{WRONG}**
   - A) five
   - B) six
   - C) seven
**Answer:** C) seven
------
#### 4. **A question without an answer?**
   - A) one
   - B) two
------
"""


def questioner(prompt: str) -> Tokens:
    return {WRITTEN: 1.0}


def checker(prompt: str) -> Tokens:
    """Sees red where there is an image, knows what the sky is like, and never counts seven legs."""
    letters = {text: letter for letter, text in re.findall(r"^([A-Z])\) (.*)$", prompt, re.MULTILINE)}
    if LEAKY in prompt:
        return {letters["blue"]: 1.0}
    if "<image>" in prompt:
        return {letters["red"] if GOOD in prompt else letters["None of the above"]: 1.0}
    return {"I cannot say": 1.0}


@pytest.fixture
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    with serving(questioner) as one, serving(checker) as other:
        yield one, other


def pictures(folder: Path) -> Path:
    """Two different images, a copy of the first, a brighter version of it, and what is none."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    brighter = Image.open(folder / "a.png").point(lambda value: min(255, int(value * 1.05)))
    brighter.save(folder / "near.png")
    (folder / "none.png").write_bytes(b"no image")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_planted_leaks_and_wrong_answers_are_found(
    tmp_path: Path, servers: tuple[FakeServer, FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    asked = [
        *("conf=conf/curate.yaml", f"run_dir={folder}", f"data.images={pictures(tmp_path / 'images')}"),
        *(
            f"{who}.endpoint.url={one.url}"
            for who, one in zip(("questioner", "checker"), servers, strict=True)
        ),
        *("questioner.max_tokens=1", "checker.max_tokens=1"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == 3, capsys.readouterr().err  # an image that is none
    card = json.loads((folder / "card.json").read_text())
    assert (card["images_kept"], card["questions_kept"], card["questions"]) == (2, 2, 6)
    assert card["images"] == 4, "the fifth is no image"
    assert card["images_left_out"] == {"duplicate_image": 1, "near_duplicate_image": 1}
    assert card["questions_left_out"] == {
        "malformed_answer": 4,
        "answered_without_image": 2,
        "image_does_not_answer": 2,
    }
    page = (folder / "card.html").read_text()
    assert page.count("<svg") == 2
    assert GOOD in page
    rows = load_rows(folder / "questions", ABSTAIN)
    assert not rows.rejects
    assert [[question.stem for question in row.questions] for row in rows] == [[GOOD]] * 2
    assert {row.questions[0].choices[row.questions[0].answer or 0] for row in rows} == {"red"}
    reasons = [json.loads(line)["reason"] for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert reasons.count("answered_without_image") == 2
    first = [len(server.bodies) for server in servers]
    assert first == [4, 2 * 3 * 4 * 2]  # images that can be read; questions, orders, with image and without

    (tmp_path / "images" / "none.png").unlink()
    assert main([*asked, "resume=true"]) == 0
    assert [len(server.bodies) for server in servers] == first, "nothing is asked again"
    assert json.loads((folder / "card.json").read_text()) == card


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_tiny_judge_finds_planted_wrong_answers_and_leaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa

    table = pq.read_table("caprl_async/tiny/data/heldout.parquet").slice(0, 12).to_pylist()
    planted: set[str] = set()
    leaky: set[str] = set()
    for row in table:
        for position, question in enumerate(row["reward_model"]["ground_truth"]):
            said = {choice[0]: choice[3:] for choice in question["choices"]}
            if said[question["answer"]] != "unknown" and position % 2:
                wrong = [
                    letter
                    for letter, text in said.items()
                    if letter != question["answer"] and text != "unknown"
                ]
                question["answer"] = wrong[0]
                planted.add(f"{row['id']}/{position}")
            elif said[question["answer"]] != "unknown" and position % 4 == 0:
                question["question"] = f"{row['reference_caption']} {question['question']}"
                leaky.add(f"{row['id']}/{position}")
    data = tmp_path / "planted.parquet"
    pq.write_table(pa.Table.from_pylist(table), data)
    folder = tmp_path / "run"
    assert main(["conf=conf/curate_demo.yaml", f"run_dir={folder}", f"curate.questions_from={data}"]) == 0
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    left: dict[str, list[str]] = {}
    for reject in rejects:
        left.setdefault(reject["reason"], []).append(f"{reject['row_id']}/{reject['question']}")
    alike = set(left.get("near_duplicate_image", ()))
    assert planted <= set(left["caption_does_not_answer"]) | alike
    found = set(left["answered_without_image"])
    assert len(leaky - alike - found) <= len(leaky) / 10, "a tiny judge may overlook one"
    assert found <= leaky, "and no other question tells its answer"
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    assert card["questions_kept"] > 10
