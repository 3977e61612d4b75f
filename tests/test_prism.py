"""What an evaluation makes of answers and captions: figures beside the score, and runs side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_kit import png

from caprl_async.benchmarks.asking import question_text
from caprl_async.benchmarks.items import Item, Rule
from caprl_async.data.images import ImageStore
from caprl_async.data.rows import DataError
from caprl_async.prism.captions import Caption, measures
from caprl_async.prism.compare import as_json, shown, sides
from caprl_async.prism.page import write
from caprl_async.prism.runs import ImageLine, QuestionLine, read_run, write_lines
from caprl_async.prism.told import Told, caption_qa, figures
from caprl_async.types import ImageRef

ABSTAIN = "Can not answer based on the caption"
COLOURS = ("red", "blue", "green", "black")


def item(name: str, gold: str = "A", image: str = "", options: tuple[str, ...] = COLOURS) -> Item:
    picture = ImageRef(sha256=image or name, path=f"/nowhere/{name}")
    return Item(name, (picture,), f"What colour is {name}?", (gold,), Rule.CHOICE, options=options)


# ---------------------------------------------------------------- CaptionQA, floors, ceilings


def test_a_wrong_answer_is_worth_less_than_none() -> None:
    offered = item("a").offering(ABSTAIN)
    assert offered.options == (*COLOURS, ABSTAIN)
    assert offered.offering(ABSTAIN) is offered
    told = Told(["red", "blue", ABSTAIN, ""], [1.0, 0.0, 0.0, None], [0.0, 0.0, 1.0, None])
    assert caption_qa(offered, told) == [1.0, 0.0, pytest.approx(1 / 4 + 0.05), None]
    expected = Told([""], [0.5], [0.25])  # a judge's probabilities
    assert caption_qa(offered, expected) == [pytest.approx(0.5 + 0.25 * 0.3)]


def test_questions_about_what_is_absent_are_no_part_of_it() -> None:
    absent = item("a", gold="E", options=(*COLOURS, ABSTAIN))
    present = item("b").offering(ABSTAIN)
    absent = replace(absent, abstain=True)
    assert absent.absent
    assert not present.absent
    told = {"a": Told([ABSTAIN], [1.0], [1.0]), "b": Told(["blue"], [0.0], [0.0])}
    found = figures([absent, present], told, macro=False, seed=0)
    assert found is not None
    assert found.caption_qa is not None
    assert found.caption_qa.mean == 0.0
    assert found.summary.mean.mean == 0.5


def test_floor_and_ceiling_are_means_over_what_was_asked_so() -> None:
    told = {
        "a": Told(["red"], [1.0], [], blind=0.0, ceiling=1.0),
        "b": Told(["blue"], [0.0], [], blind=1.0),
    }
    found = figures([item("a"), item("b"), item("c")], told, macro=False, seed=0)
    assert found is not None
    assert found.blind is not None
    assert found.ceiling is not None
    assert (found.blind.mean, found.ceiling.mean, found.caption_qa) == (0.5, 1.0, None)
    assert (found.summary.items, found.summary.unscored) == (2, 1)
    assert figures([item("a")], {}, macro=False, seed=0) is None


def test_options_that_stand_in_the_image_are_not_added_to() -> None:
    letters = item("a", options=("A", "B", "C", "D"))
    assert letters.offering(ABSTAIN) is letters
    assert "A)" not in question_text(letters)
    assert "E) Can not answer" in question_text(item("a").offering(ABSTAIN))


# ---------------------------------------------------------------- captions


def test_only_captions_of_what_is_asked_are_measured() -> None:
    captions = {"one": [Caption("a b")], "unasked": [Caption("c d e f")], "other": [Caption("g")]}
    by_id = item("other", image="an image that nobody hashed")
    found = measures(captions, [item("one"), by_id])
    assert (found["captions"], found["words_mean"]) == (2, 1.5)


def test_captions_are_measured_without_asking_anybody() -> None:
    captions = {
        "one": [Caption("a red circle", False), Caption("what colour is one? red red red red red red", True)],
        "other": [Caption("this caption is complete", False)],
    }
    found = measures(captions, [item("one"), item("other")])
    assert (found["captions"], found["words_median"]) == (3, 4)
    assert found["words_mean"] == pytest.approx((3 + 10 + 4) / 3)
    assert found["truncated"] == pytest.approx(1 / 3)
    assert found["meta"] == pytest.approx(1 / 3)
    assert found["question_echo"] == pytest.approx(1 / 3)
    assert found["repetition"] is not None
    assert found["repetition"] > 0
    assert measures({"one": [Caption("made elsewhere")]}, [])["truncated"] is None
    assert measures({}, [])["words_mean"] is None


# ---------------------------------------------------------------- side by side


def run(folder: Path, scores: dict[str, float], **result: Any) -> Path:
    """An evaluation of questions about two images, one question each."""
    folder.mkdir()
    store = ImageStore(folder / "store")
    pictures = {name: store.put(png(name)) for name in scores}
    questions = [
        QuestionLine(
            Item(name, (pictures[name],), "What colour?", ("A",), Rule.CHOICE, options=COLOURS),
            Told([f"<b>{folder.name} says</b>"], [score], [None]),
        )
        for name, score in scores.items()
    ]
    write_lines(folder / "scores.jsonl", questions)
    images = [
        ImageLine(ref.sha256, ref.path, [f"{folder.name} sees {name}"]) for name, ref in pictures.items()
    ]
    write_lines(folder / "images.jsonl", images)
    told = {line.item.item_id: line.told for line in questions if line.told}
    found = figures([line.item for line in questions], told, macro=False, seed=0)
    assert found is not None
    captions = {image.sha256: [Caption(text) for text in image.captions] for image in images}
    whole = {
        "benchmark": "custom", "captioner": "x", "answerer": "y", "captions_per_image": 1,
        "asking": {"answerer": "y", "template": "t"},
        "captions": measures(captions, []), **found.as_json(), **result,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(whole))
    return folder


def test_runs_are_held_against_the_first(tmp_path: Path) -> None:
    one = read_run(run(tmp_path / "one", {"red": 1.0, "blue": 0.0, "lime": 0.0}))
    other = read_run(run(tmp_path / "other", {"red": 1.0, "blue": 1.0, "teal": 0.0}))
    found = sides([one, other], seed=0)
    assert (found[0].better, found[1].shared) == (None, 2)
    assert found[1].better is not None
    assert found[1].better.mean == 0.5
    first, second = as_json(found)
    assert (first["run"], first["better_than_first"]) == ("one", None)
    assert second["better_than_first"]["mean"] == 0.5
    pictures = shown([one, other], 2)
    assert [one.questions[0][0].item_id for one in pictures] == ["blue", "red"], "where they differ, first"
    page = write(found, tmp_path / "page.html", 2).read_text()
    assert page.count("data:image/png") == 2
    assert "other sees blue" in page
    assert "<b>other says</b>" not in page, "what models write is escaped"
    assert "&lt;b&gt;other says" in page
    assert "50.0%" in page


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("benchmark", {"benchmark": "another"}),
        ("answerer", {"asking": {"answerer": "another", "template": "t"}}),
        ("template", {"asking": {"answerer": "y", "template": "another"}}),
    ],
)
def test_runs_that_measure_other_things_are_not_compared(
    key: str, more: dict[str, Any], tmp_path: Path
) -> None:
    one = read_run(run(tmp_path / "one", {"red": 1.0}))
    other = read_run(run(tmp_path / "other", {"red": 1.0}, **more))
    with pytest.raises(DataError, match=f"one and other cannot be compared: {key}"):
        sides([one, other], seed=0)
    third = read_run(run(tmp_path / "third", {"blue": 1.0}))
    with pytest.raises(DataError, match="no question in common"):
        sides([one, third], seed=0)


def test_questions_of_the_same_id_that_differ_are_not_paired(tmp_path: Path) -> None:
    one = read_run(run(tmp_path / "one", {"red": 1.0, "blue": 1.0}))
    path = run(tmp_path / "other", {"red": 0.0, "blue": 0.0})
    text = (path / "scores.jsonl").read_text()
    (path / "scores.jsonl").write_text(text.replace("What colour?", "Which shape?", 1))
    found = sides([one, read_run(path)], seed=0)
    assert found[1].shared == 1


def test_the_page_marks_what_a_judge_chose(tmp_path: Path) -> None:
    """A probability below one half may be that of the right option."""
    folder = run(tmp_path / "one", {"red": 0.45})
    text = (folder / "scores.jsonl").read_text()
    (folder / "scores.jsonl").write_text(text.replace("<b>one says</b>", "red"))
    (only,) = shown([read_run(folder)], 1)
    (cell,) = only.questions[0][1]
    assert (cell.answer, cell.right) == ("red", True)


def test_a_damaged_run_is_one_error(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", {"red": 1.0})
    (folder / "scores.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"scores\.jsonl, line 1"):
        read_run(folder)
    (folder / "result.json").unlink()
    with pytest.raises(DataError, match=r"result\.json"):
        read_run(folder)
