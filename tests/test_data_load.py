"""Every form of data file, good and bad: a bad question or row never costs the others."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay_kit import png, write_data

from caprl_async.data.load import load_rows
from caprl_async.data.questions import build_question, from_mapping, split_options, strip_letters
from caprl_async.data.rows import BadQuestion, DataError
from caprl_async.types import QuestionKind

ABSTAIN = "Can not answer based on the caption"
GOOD = {"question": "colour?", "choices": ["A) red", "B) blue"], "answer": "B"}


def question(choices: Any, answer: Any, stem: Any = "what?") -> Any:
    return build_question("q", stem, choices, answer, ABSTAIN)


@pytest.mark.parametrize(
    "choices",
    [
        ["A) red", "B) blue"],
        ["A. red", "B. blue"],
        ["(A) red", "(B) blue"],
        ["red", "blue"],
        [" A)red", "B)  blue "],
        ["A: red", "B: blue"],
        ["[A] red", "[B] blue"],
        ["A\uff09 red", "\uff08B\uff09 blue"],
    ],
)
@pytest.mark.parametrize("answer", ["B", "B)", "(B)", "B.", "blue", "B) blue", " Blue "])
def test_letter_forms(choices: list[str], answer: str) -> None:
    built = question(choices, answer)
    assert built.choices == ("red", "blue")
    assert built.answer == 1
    assert built.kind is QuestionKind.FACT


def test_small_letters_are_letters_if_all_are() -> None:
    built = question(["b) blue", "a) red"], "b")
    assert (built.choices, built.answer) == (("blue", "red"), 0)
    assert question(["a", "b"], "b").choices == ("a", "b")


@pytest.mark.parametrize("choices", [["10\u00b2", "102"], ["x\u2081", "x1"], ["\u2460", "1"]])
def test_options_that_read_differently_are_different(choices: list[str]) -> None:
    assert question(choices, "A").choices == tuple(choices)


def test_what_looks_like_options_in_a_stem_stays_in_it() -> None:
    stem, options = split_options("Look.\nA. Smith holds what?\nA) red\nB) blue")
    assert (stem, options) == ("Look.\nA. Smith holds what?", ["A) red", "B) blue"])


def test_letters_inside_the_texts_stay() -> None:
    built = question(["A) B) or not", "B) the letter A", "C) (C) 1999"], "B")
    assert built.choices == ("B) or not", "the letter A", "(C) 1999")
    assert built.answer == 1


def test_a_name_that_looks_like_a_letter_stays_whole() -> None:
    assert strip_letters(["A. Lincoln", "Washington"])[1] == ["A. Lincoln", "Washington"]
    assert question(["B) two", "A) one"], "A").answer == 1  # letters out of order still mean themselves


@pytest.mark.parametrize(
    ("choices", "answer", "stem", "reason"),
    [
        (["red", "Red "], "A", "q?", "duplicate_options"),
        (["red", "blue"], "C", "q?", "gold_not_an_option"),
        (["red", "blue"], None, "q?", "gold_not_an_option"),
        (["red", "blue"], "According to", "q?", "gold_not_an_option"),
        ([], "A", "q?", "no_choices"),
        ("red", "A", "q?", "no_choices"),
        (["red", 3], "A", "q?", "malformed_choice"),
        (["red", " "], "A", "q?", "empty_choice"),
        (["red", "blue"], "A", "  ", "empty_question"),
        ([f"c{i}" for i in range(26)], "A", "q?", "too_many_options"),
        ([ABSTAIN], "A", "q?", "no_choices"),
        (["red", "\u200b"], "A", "q?", "empty_choice"),  # nothing to be seen
        (["red", "blue"], "A", "\u2060 \u200b", "empty_question"),
        (["\uff52\uff45\uff44", "red"], "red", "q?", "duplicate_options"),  # full-width
        (["A) red", "B) blue", "C green"], "A", "q?", "malformed_letters"),
        (["A) red", "B) blue", "green"], "A", "q?", "malformed_letters"),
        (["A) blue", "B) red"], "A) red", "q?", "contradictory_answer"),
    ],
)
def test_a_bad_question_says_why(choices: Any, answer: Any, stem: str, reason: str) -> None:
    with pytest.raises(BadQuestion) as bad:
        question(choices, answer, stem)
    assert bad.value.reason == reason


def test_the_abstain_option_is_taken_out() -> None:
    kept = question(["A) red", f"B) {ABSTAIN}.", "C) blue"], "C")
    assert (kept.choices, kept.answer, kept.kind) == (("red", "blue"), 1, QuestionKind.FACT)
    absent = question(["A) red", f"B) {ABSTAIN.upper()}", "C) blue"], "B")
    assert (absent.choices, absent.answer, absent.kind) == (("red", "blue"), None, QuestionKind.ABSENT)


@pytest.mark.parametrize("answer", [ABSTAIN, f"{ABSTAIN}.", f"C) {ABSTAIN}", f" (C) {ABSTAIN.upper()}"])
def test_an_abstain_answer_need_not_be_listed(answer: str) -> None:
    absent = question(["A) red", "B) blue"], answer)
    assert (absent.choices, absent.answer, absent.kind) == (("red", "blue"), None, QuestionKind.ABSENT)


def test_questions_may_carry_weights() -> None:
    entry = {"question": "q?", "choices": ["red", "blue"], "answer": "A"}
    assert from_mapping("q", entry, ABSTAIN).weight == 1.0
    assert from_mapping("q", {**entry, "weight": 3}, ABSTAIN).weight == 3.0
    for weight in (0, -1, "2", True, float("nan"), float("inf"), 10**400, 1e300):
        with pytest.raises(BadQuestion, match="bad_weight"):
            from_mapping("q", {**entry, "weight": weight}, ABSTAIN)


@given(st.lists(st.text("abcdef", min_size=1), min_size=1, max_size=25, unique=True), st.data())
def test_the_answer_keeps_its_text(texts: list[str], data: Any) -> None:
    gold = data.draw(st.integers(0, len(texts) - 1))
    lettered = [f"{chr(65 + i)}) {text}" for i, text in enumerate(texts)]
    built = question(lettered, chr(65 + gold))
    assert built.choices[built.answer] == texts[gold]


@given(st.one_of(st.none(), st.text(), st.integers(), st.lists(st.text())), st.one_of(st.text(), st.none()))
def test_any_content_is_a_question_or_a_typed_error(choices: Any, answer: Any) -> None:
    with suppress(BadQuestion):
        assert question(choices, answer).choices


def test_question_text_with_option_lines() -> None:
    stem, options = split_options("Which one?\nLook well.\n   - A) red\n   - B) blue\n     or navy")
    assert stem == "Which one?\nLook well."
    assert options == ["A) red", "B) blue or navy"]


def test_caprl_qa_with_bad_rows_among_good_ones(tmp_path: Path) -> None:
    rows = [
        [GOOD],
        [{**GOOD, "answer": "Z"}, GOOD],
        [{**GOOD, "answer": "Z"}],
        [],
        [GOOD],
        [GOOD],
    ]
    path = write_data(
        tmp_path / "d.parquet",
        6,
        id=["a", "b", "c", "d", "a", ""],
        reward_model=[{"ground_truth": questions} for questions in rows],
    )
    data = load_rows(path, ABSTAIN)
    assert [row.row_id for row in data] == ["a", "b"]
    assert data.reject_counts == {
        "gold_not_an_option": 2,
        "no_questions": 2,
        "duplicate_id": 1,
        "missing_id": 1,
    }
    row = data.get("b")
    assert row is not None
    assert [q.question_id for q in row.questions] == ["b/1"]
    assert row.prompt == "describe ."
    assert row.reference_caption == "reference 1"
    data.write_rejects(tmp_path / "rejects.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert lines[0]["row_id"] == "b"
    assert lines[0]["question"] == 0


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    pq.write_table(
        pa.table(
            {
                "id": ["a", "b"],
                "image": [{"bytes": png(1), "path": None}, {"bytes": None, "path": "missing.png"}],
                "reward_model": [{"ground_truth": [GOOD]}] * 2,
            }
        ),
        tmp_path / "d.parquet",
    )
    data = load_rows(tmp_path / "d.parquet", ABSTAIN)
    assert data.reject_counts == {"missing_image": 1}
    assert (data.rows[0].prompt, data.rows[0].reference_caption, data.rows[0].facts) == ("", None, None)


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def openrlhf_line(image: str, answers: str) -> dict[str, str]:
    turns = [
        {"role": "system", "content": "be good"},
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "Describe."}],
        },
        {"role": "answer", "content": answers},
    ]
    return {"message": json.dumps(turns)}


def test_openrlhf_jsonl_is_parsed_and_never_evaluated(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(1))
    good = repr([("Colour?\nA) red\nB) blue", "B"), ("Shape?\nA. star\nB. cross", "A")])
    evil = f"__import__('pathlib').Path({str(tmp_path / 'evil')!r}).write_text('x')"
    path = jsonl(
        tmp_path / "d.jsonl",
        openrlhf_line("i.png", good),
        openrlhf_line("i.png", evil),
        openrlhf_line("nowhere.png", good),
        openrlhf_line("x" * 5000, good),
        openrlhf_line("i.png", "{{'a': 1}}"),
        "{not json",
        {"message": "[]"},
    )
    data = load_rows(path, ABSTAIN)
    assert len(data) == 1
    assert data.rows[0].row_id == "d:1"
    assert data.rows[0].prompt == "Describe."
    assert [q.answer for q in data.rows[0].questions] == [1, 0]
    assert data.rows[0].questions[1].stem == "Shape?"
    assert sum(data.reject_counts.values()) == 6
    for _ in range(2):  # as a resumed run does
        data.write_rejects(tmp_path / "rejects.jsonl")
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "evil").exists()


def test_verl_jsonl(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(1))
    truth = {
        "reward_model": {"ground_truth": [GOOD]},
        "prompt": [{"role": "user", "content": "<image> Say."}],
    }
    path = jsonl(
        tmp_path / "d.jsonl",
        {"images": ["i.png"], **truth},
        {"videos": ["i.png"], **truth},
        {"videos": ["v.mp4"], **truth},
        {"images": ["i.png", "i.png"], **truth},
    )
    data = load_rows(path, ABSTAIN)
    assert data.rows[0].image == tmp_path / "i.png"
    assert data.rows[0].prompt == "Say."
    assert [row.video for row in data] == [False, True]
    assert data.reject_counts == {"missing_image": 1, "several_images": 1}


def test_a_wrong_file_is_named_with_its_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_rows(tmp_path / "none.parquet", ABSTAIN)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"\.csv"):
        load_rows(tmp_path / "a.csv", ABSTAIN)
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        load_rows(tmp_path / "a.parquet", ABSTAIN)
    pq.write_table(pa.table({"id": ["a"], "image": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet.*'reward_model'"):
        load_rows(tmp_path / "b.parquet", ABSTAIN)
    with pytest.raises(DataError, match="'message'"):
        load_rows(jsonl(tmp_path / "c.jsonl", {"text": 1}), ABSTAIN)
    with pytest.raises(DataError, match="no usable row"):
        load_rows(jsonl(tmp_path / "e.jsonl", {"message": 3}), ABSTAIN)
