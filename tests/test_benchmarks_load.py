"""Every benchmark's two file forms, made here after their published columns, become the same items."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_kit import in_text, png, write_tsv

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.load import Benchmarked, limited, load_items
from caprl_async.benchmarks.scorers import score
from caprl_async.benchmarks.table import BENCHMARKS
from caprl_async.data.images import ImageStore
from caprl_async.data.rows import DataError

PICTURE = {"bytes": png(), "path": None}
FOUR = {"A": "one", "B": "two", "C": "None", "D": "NA"}
LETTERS = tuple(FOUR.values())
CHOICE = (Rule.CHOICE, LETTERS, ("B",))
Q = "How many?"

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Rule, tuple[str, ...], tuple[str, ...]]]] = {
    "ai2d": (
        {"question": Q, **FOUR, "answer": "B"},
        {"question": Q, "options": list(LETTERS), "answer": "1"},
        CHOICE,
    ),
    "mmstar": (
        {"question": Q, **FOUR, "answer": "B", "category": "math", "l2_category": "x"},
        {"question": f"{Q}\nOptions: A: one, B: two, C: None, D: NA", "answer": "B", "category": "math"},
        CHOICE,
    ),
    "mmmu": (
        {"question": f"<image 1> {Q}", **FOUR, "answer": "B", "split": "validation"},
        {
            "question": f"<image 1> {Q}",
            "options": str(list(LETTERS)),
            "answer": "B",
            "question_type": "multiple-choice",
        },
        CHOICE,
    ),
    "mmmu_pro": (
        {"question": Q, **FOUR, "answer": "B"},
        {"question": Q, "options": str(list(LETTERS)), "answer": "B"},
        CHOICE,
    ),
    "seed2plus": (
        {"question": Q, **FOUR, "answer": "B"},
        {"question": Q, **{f"choice_{k}": v for k, v in FOUR.items()}, "answer": "B", "question_id": "7"},
        CHOICE,
    ),
    "seed": (
        {"question": Q, **FOUR, "answer": "B"},
        {"question": Q, **{f"choice_{k.lower()}": v for k, v in FOUR.items()}, "answer": "B"},
        CHOICE,
    ),
    "chartqa": (
        {"question": Q, "answer": "14%", "split": "human"},
        {"question": Q, "answer": ["14%"], "type": "human_test"},
        (Rule.RELAXED, (), ("14%",)),
    ),
    "infovqa": (
        {"question": Q, "answer": "['3', 'three']"},
        {"questionId": "7", "question": Q, "answers": ["3", "three"]},
        (Rule.ANLS, (), ("3", "three")),
    ),
    "docvqa": (
        {"question": Q, "answer": "['3', 'three']"},
        {"questionId": "7", "question": Q, "answers": ["3", "three"]},
        (Rule.ANLS, (), ("3", "three")),
    ),
    "charxiv": (
        {"question": Q, "answer": "3"},
        {"reasoning_q": Q, "reasoning_a": "3", "descriptive_q1": 4, "figure_path": "x.jpg"},
        (Rule.GRADED, (), ("3",)),
    ),
    "chartqapro": (
        {
            "question": str([Q]),
            "answer": "['3']",
            "year": "['NO']",
            "question_type": "Factoid",
            "paragraph": "",
        },
        {"Question": [Q], "Answer": ["3"], "Year": ["NO"], "Question Type": "Factoid", "Paragraph": ""},
        (Rule.CHART_PRO, (), ("3",)),
    ),
    "mathvista": (
        {"question": Q, "answer": "3", "answer_type": "integer", "question_type": "free_form", "choices": ""},
        {
            "pid": "7",
            "question": Q,
            "answer": "3",
            "answer_type": "integer",
            "choices": None,
            "precision": None,
        },
        (Rule.TYPED, (), ("3",)),
    ),
    "mathverse": (
        {
            "question": f"{Q}\nChoices:\nA:one\nB:two\nC:None\nD:NA",
            "answer": "B",
            "problem_version": "Text Lite",
        },
        {"question": f"{Q}\nChoices:\nA:one\nB:two\nC:None\nD:NA", "answer": "B", "sample_index": "7"},
        CHOICE,
    ),
    "mathvision": (
        {"question": Q, "choices": str(list(LETTERS)), "answer": "B"},
        {"question": Q, "options": list(LETTERS), "answer": "B", "id": "7"},
        CHOICE,
    ),
    "wemath": (
        {"question": Q, **FOUR, "answer": "B", "key": "2steps_1", "ID": "7"},
        {"question": Q, "option": "A. one; B. two; C. None; D. NA", "answer": "B", "key": "x"},
        CHOICE,
    ),
    "visulogic": (
        {"question": Q, "answer": "B"},
        {"question": Q, "label": "B", "id": "7"},
        (Rule.CHOICE, ("A", "B", "C", "D"), ("B",)),
    ),
    "realworldqa": (
        {"question": Q, **FOUR, "answer": "B"},
        {"question": f"{Q}\nA. one\nB. two\nC. None\nD. NA", "answer": "B"},
        CHOICE,
    ),
    "gqa": (
        {"question": Q, "answer": "yes"},
        {"question": Q, "answer": "yes", "id": "7"},
        (Rule.EXACT, (), ("yes",)),
    ),
    "mmbench": (
        {"question": Q, **FOUR, "answer": "B", "hint": ""},
        {"index": "1000007", "question": Q, **FOUR, "answer": "B", "hint": None, "split": "dev"},
        CHOICE,
    ),
    "mmvet": (
        {"question": Q, "answer": "a<AND>b", "capability": "ocr"},
        {"question_id": "7", "question": Q, "answer": "a<AND>b", "capability": "ocr"},
        (Rule.GRADED, (), ("a<AND>b",)),
    ),
    "mme_realworld": (
        {"question": Q, **FOUR, "answer": "B", "category": "OCR"},
        {"question": Q, "multi-choice options": [f"({k}) {v}" for k, v in FOUR.items()], "answer": "B"},
        CHOICE,
    ),
    "custom": (
        {"question": Q, **FOUR, "answer": "B"},
        {"question": Q, "options": list(LETTERS), "answer": "B"},
        CHOICE,
    ),
}

PROMPTED = {
    "chartqa": Rule.RELAXED,
    "infovqa": Rule.ANLS,
    "charxiv": Rule.GRADED,
    "chartqapro": Rule.CHART_PRO,
    "mmmu": Rule.OPEN,
    "mathvision": Rule.MATH,
    "visulogic": Rule.EXACT,
    "custom": Rule.EXACT,
}
"""The rules of questions without options in Prism's form."""


def write_parquet(path: Path, *rows: dict[str, Any], column: str = "image") -> Path:
    pq.write_table(pa.Table.from_pylist([{column: PICTURE, **row} for row in rows]), path)
    return path


def read(name: str, path: Path) -> Benchmarked:
    return load_items(name, path, ImageStore(path.parent / "images"))


def only(found: Benchmarked) -> Item:
    assert found.rejects == ()
    (item,) = found.items
    return item


def test_the_forms_are_of_all_benchmarks() -> None:
    assert set(FORMS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", list(FORMS))
def test_both_forms_are_read(name: str, tmp_path: Path) -> None:
    tsv, parquet, (rule, options, golds) = FORMS[name]
    column = BENCHMARKS[name].images[0]
    for item in (
        only(read(name, write_tsv(tmp_path / "a.tsv", tsv))),
        only(read(name, write_parquet(tmp_path / "b.parquet", parquet, column=column))),
    ):
        assert (item.rule, item.options, item.golds) == (rule, options, golds)
        assert item.question == Q
        assert Path(item.images[0].path).read_bytes() == png()


@pytest.mark.parametrize("name", list(PROMPTED))
def test_the_form_of_prism_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "prompt": Q, "answer": "14"},
        {"image": ["a.png", "a.png"], "prompt": f"{Q}\nA. one\nB. two\nAnswer briefly.", "answer": "B"},
        {"image": "none.png", "prompt": Q, "answer": "14"},
        {"image": "a.png", "answer": "14"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read(name, tmp_path / "a.json")
    plain, choice = found.items
    assert (plain.question, plain.rule, plain.golds) == (Q, PROMPTED[name], ("14",))
    assert (choice.question, choice.options, choice.golds) == (
        f"{Q}\nAnswer briefly.",
        ("one", "two"),
        ("B",),
    )
    assert len(choice.images) == 2
    assert [reject.reason for reject in found.rejects] == ["missing_image", "missing_column"]


def test_a_prompt_without_options_is_no_item_of_a_benchmark_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "prompt": Q, "answer": "B"}]))
    with pytest.raises(DataError, match="no_choices"):
        read("mmstar", tmp_path / "a.json")


def prompted(tmp_path: Path, name: str, **row: Any) -> Item:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "prompt": Q, **row}]))
    return only(read(name, tmp_path / "a.json"))


@pytest.mark.parametrize("gold", ["(2, 3)", "[0, 5)", "[0, 5]", "(1/2)"])
def test_an_expression_in_brackets_is_one_answer(gold: str, tmp_path: Path) -> None:
    item = prompted(tmp_path, "mathvision", answer=gold)
    assert item.golds == (gold,)
    assert score(r"\boxed{2}", item) == 0
    assert score(rf"\boxed{{{gold}}}", item) == 1


def test_a_list_of_answers_is_one_of_alternatives(tmp_path: Path) -> None:
    assert prompted(tmp_path, "infovqa", answer="['a', 'b']").golds == ("a", "b")
    assert prompted(tmp_path, "infovqa", answer=["a", "b"]).golds == ("a", "b")
    assert prompted(tmp_path, "infovqa", answer="[sic]").golds == ("[sic]",)


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["red", "blue"], "answer": "blue"},
        {"options": ["red", "blue"], "answer": "b"},
        {"A": "red", "B": "blue", "answer": "B"},
        {"prompt": f"{Q}\nA. red\nB. blue", "answer": "blue"},
        {"prompt": f"{Q}\nA. red\nB. blue", "answer": "b"},
    ],
)
def test_options_are_never_lost(row: dict[str, Any], tmp_path: Path) -> None:
    item = prompted(tmp_path, "custom", **row)
    assert (item.question, item.rule, item.options, item.golds) == (Q, Rule.CHOICE, ("red", "blue"), ("B",))


def test_a_gold_answer_that_is_no_option_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = {"image": "a.png", "prompt": Q, "options": ["red", "blue"], "answer": "green"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="gold_not_an_option"):
        read("custom", tmp_path / "a.json")


def test_ids_that_come_again_lose_no_question(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"id": 7, "image": "a.png", "prompt": f"{Q} {n}", "answer": "14"} for n in (1, 2, 3, 2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read("custom", tmp_path / "a.json")
    assert [item.item_id for item in found.items] == ["7", "7#2", "7#3"]
    assert [reject.reason for reject in found.rejects] == ["duplicate"]
    steps = [{"question": f"{Q} {n}", **FOUR, "answer": "B", "key": "2steps_1", "ID": "1"} for n in range(3)]
    assert (
        len({item.item_id for item in read("wemath", write_parquet(tmp_path / "w.parquet", *steps)).items})
        == 3
    )


def test_a_circle_with_a_bad_member_is_left_out_and_a_limit_keeps_circles_whole(tmp_path: Path) -> None:
    row = {"question": Q, **FOUR, "answer": "B"}
    rows = [{**row, "index": str(index)} for index in (1, 2, 1_000_001, 1_000_002, 2_000_001)]
    rows[3]["answer"] = "Q"
    found = read("mmbench", write_tsv(tmp_path / "a.tsv", *rows))
    assert {item.item_id for item in found.items} == {"1", "1000001", "2000001"}
    assert [reject.reason for reject in found.rejects] == ["bad_gold", "incomplete_circle"]
    assert [item.item_id for item in limited(found.items, 1)] == ["1", "1000001", "2000001"]
    assert limited(found.items, 0) == list(found.items)


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_what_is_no_list_of_objects_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json"):
        read("chartqa", tmp_path / "a.json")


def test_an_image_may_be_that_of_another_row_and_there_may_be_several(tmp_path: Path) -> None:
    row = {"question": Q, **FOUR, "answer": "A"}
    both = str([in_text(png("blue")), in_text(png("lime"))])
    path = write_tsv(
        tmp_path / "a.tsv", {**row, "image": "3"}, {**row, "image": both}, row, {**row, "image": "9"}
    )
    found = read("mmmu", path)
    first, second, third = found.items
    assert first.images == third.images
    assert [Path(ref.path).read_bytes() for ref in second.images] == [png("blue"), png("lime")]
    (bad,) = found.rejects
    assert (bad.row_id, bad.reason) == ("4", "missing_image")


def test_several_images_are_named_in_the_question(tmp_path: Path) -> None:
    pictures = {"image_1": PICTURE, "image_2": {"bytes": png("blue"), "path": None}}
    row = {
        "question": "Is <image 1> before <image 2>?",
        "options": "['yes', 'no']",
        "answer": "A",
        **pictures,
    }
    item = only(read("mmmu", write_parquet(tmp_path / "a.parquet", row, column="image_3")))
    assert len(item.images) == 3
    assert item.question == "Is image 1 before image 2?"


def test_mmmu_without_options_is_open(tmp_path: Path) -> None:
    row = {"question": Q, "options": "[]", "answer": "['120', '120 mA']", "question_type": "open"}
    item = only(read("mmmu", write_parquet(tmp_path / "a.parquet", row, column="image_1")))
    assert (item.rule, item.golds) == (Rule.OPEN, ("120", "120 mA"))


def test_the_last_turn_of_a_conversation_is_asked(tmp_path: Path) -> None:
    row = {
        "Question": ["a?", "b?"],
        "Answer": ["1", "2019"],
        "Year": ["NO", "YES"],
        "Question Type": "Conversational",
    }
    item = only(read("chartqapro", write_parquet(tmp_path / "a.parquet", row)))
    assert (item.question, item.golds, item.years) == ("a?\n1\nb?", ("2019",), (True,))


def test_a_list_is_scored_by_its_parts(tmp_path: Path) -> None:
    row = {
        "Question": ["which?"],
        "Answer": ["[2018, 'x, y']"],
        "Year": ["YES", "NO"],
        "Question Type": "Factoid",
    }
    item = only(read("chartqapro", write_parquet(tmp_path / "a.parquet", row)))
    assert (item.golds, item.years) == (("2018", "x, y"), (True, False))


def test_an_index_of_ai2d_is_no_text(tmp_path: Path) -> None:
    row = {"question": Q, "options": ["3", "2", "1", "0"], "answer": "0"}
    assert only(read("ai2d", write_parquet(tmp_path / "a.parquet", row))).golds == ("A",)


def test_an_answer_of_mathvista_is_a_text_even_if_it_is_a_number(tmp_path: Path) -> None:
    row = {"question": Q, "choices": ["3", "2", "1", "0"], "answer": "0", "answer_type": "integer"}
    item = only(read("mathvista", write_parquet(tmp_path / "a.parquet", row, column="decoded_image")))
    assert item.golds == ("D",)
    row = {"question": Q, "choices": ["B", "A"], "answer": "A"}
    item = only(read("mathvista", write_parquet(tmp_path / "b.parquet", row, column="decoded_image")))
    assert item.golds == ("B",)


@pytest.mark.parametrize(
    ("name", "column", "path"),
    [
        ("mathvista", "decoded_image", "image"),
        ("mathvision", "decoded_image", "image"),
        ("gqa", "image", "imageId"),
    ],
)
def test_a_second_column_that_only_names_the_image_is_none(
    name: str, column: str, path: str, tmp_path: Path
) -> None:
    row = {"question": Q, "answer": "14", path: "images/1.jpg"}
    assert len(only(read(name, write_parquet(tmp_path / "a.parquet", row, column=column))).images) == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mathvista", {"precision": "nan"}),
        ("mathvista", {"precision": "x"}),
        ("ai2d", {"answer": "\u00b2", **FOUR}),
        ("ai2d", {"answer": "9", **FOUR}),
    ],
)
def test_a_cell_that_is_no_number_costs_its_row_alone(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    good = {"question": Q, "answer": "1", "precision": "1", **(FOUR if name == "ai2d" else {})}
    rows = [{**good, "index": "1"}, {**good, **changes, "index": "2"}]
    found = read(name, write_tsv(tmp_path / "a.tsv", *rows))
    assert [item.item_id for item in found.items] == ["1"]
    assert [reject.row_id for reject in found.rejects] == ["2"]


def test_circles_of_mmbench(tmp_path: Path) -> None:
    row = {"question": Q, **FOUR, "answer": "A"}
    path = write_tsv(
        tmp_path / "a.tsv", {**row, "index": "7"}, {**row, "index": "1000007"}, {**row, "index": "8"}
    )
    assert [item.circle for item in read("mmbench", path).items] == ["7", "7", "8"]
    shutil.copy(path, tmp_path / "b.tsv")
    twice = read("mmbench", tmp_path)
    assert [item.circle for item in twice.items] == ["7", "7", "8"]
    assert [reject.reason for reject in twice.rejects] == ["duplicate"] * 3
    other = {**row, "question": "in another language?"}
    write_tsv(tmp_path / "b.tsv", *({**other, "index": index} for index in ("7", "1000007", "8")))
    circles = [item.circle for item in read("mmbench", tmp_path).items]
    assert circles == ["7", "7", "8", "7#2", "7#2", "8#2"]


def test_a_bad_row_costs_only_itself(tmp_path: Path) -> None:
    row = {"question": Q, **FOUR, "answer": "A"}
    bad = [
        {**row, "answer": "Q"},
        {**row, "question": ""},
        {**row, "image": "x" * 100},
        {**row, "image": in_text(png()[:60])},
        {**row, "A": "", "answer": "A"},
        {**row, "index": "1"},
    ]
    found = read("ai2d", write_tsv(tmp_path / "a.tsv", row, *bad))
    assert [item.item_id for item in found.items] == ["1"]
    assert [reject.reason for reject in found.rejects] == [
        "bad_gold", "missing_column", "bad_image", "bad_image", "bad_gold", "duplicate",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("nothing", lambda path: write_tsv(path / "a.tsv", {"question": Q}), "is no benchmark"),
        ("gqa", lambda path: path / "none.tsv", "no such file"),
        ("gqa", lambda path: path, "a folder without"),
        ("ai2d", lambda path: write_tsv(path / "a.tsv", {"question": Q, "answer": "A"}), "no row that AI2D"),
        ("gqa", lambda path: write_parquet(path / "a.parquet", {"answer": "x"}), "no value in question"),
    ],
)
def test_an_unusable_file_is_one_error(name: str, write: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read(name, write(tmp_path))


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("a.tsv", "a.parquet"):
        (tmp_path / name).write_bytes(b"\x00\xff" * 100)
        with pytest.raises(DataError, match=name):
            read("gqa", tmp_path / name)
