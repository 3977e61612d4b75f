"""From what a questioner writes to questions; images that look alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image, ImageEnhance

from caprl_async.config import CurateConfig
from caprl_async.curation.checks import Accuracy, is_right, orders, prompt, refusal, shown
from caprl_async.curation.near import Near, perceptual_hash
from caprl_async.curation.written import FORM, parse
from caprl_async.types import Question

ABSTAIN = "Can not answer based on the caption"
GOOD = """\
#### 1. **What colour is the circle?**
   - A) red
   - B) blue
   - C) green
   - D) grey
**Answer:** B) blue
------
#### 2. **How many **big** circles are there?**
   - A) 1
   - B) 2
**Answer:** A) 1
------
"""


def test_the_published_form() -> None:
    found = parse(GOOD, "img", ABSTAIN)
    assert not found.rejects
    first, second = found.questions
    assert (first.question_id, first.stem, first.choices, first.answer) == (
        "img/0",
        "What colour is the circle?",
        ("red", "blue", "green", "grey"),
        1,
    )
    assert second.stem == "How many **big** circles are there?"


def test_the_example_in_the_prompt_is_of_the_form() -> None:
    example = FORM.format(n=3).partition("\n\n")[2].replace("another", "{}").format("b", "c", "d", "b")
    (question,) = parse(example, "img", ABSTAIN).questions
    assert (question.stem, question.answer) == ("The question?", 1)


HEAD = "#### 1. **What?**"
A, B = "   - A) red", "   - B) blue"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["What?", A, B, "**Answer:** A) red"], "malformed_heading"),
        ([HEAD, A, B, "Answer: A) red"], "malformed_answer"),
        ([HEAD, A, B], "malformed_answer"),
        ([HEAD], "malformed_answer"),
        ([HEAD, A, "and so on", "**Answer:** A) red"], "malformed_option"),
        ([HEAD, B, A, "**Answer:** A) red"], "malformed_letters"),
        ([HEAD, A, "**Answer:** A) red"], "malformed_letters"),
        ([HEAD, A, B, "**Answer:** C) green"], "gold_not_an_option"),
        ([HEAD, A, B, "**Answer:** A) blue"], "contradictory_answer"),
        ([HEAD, A, "   - B) red", "**Answer:** A) red"], "duplicate_options"),
        ([], "no_questions"),
    ],
)
def test_what_is_not_of_the_form_is_counted_and_costs_no_other(lines: list[str], reason: str) -> None:
    alone = parse("\n".join(lines), "img", ABSTAIN)
    assert [reject.reason for reject in alone.rejects] == [reason]
    assert not alone.questions
    if lines:
        beside = parse("\n".join([*lines, "------", GOOD]), "img", ABSTAIN)
        assert len(beside.questions) == 2
        assert [reject.reason for reject in beside.rejects] == [reason]


def test_a_question_that_comes_twice_is_asked_once() -> None:
    found = parse(GOOD + GOOD, "img", ABSTAIN)
    assert len(found.questions) == 2
    assert {reject.reason for reject in found.rejects} == {"duplicate_question"}


@given(st.text())
def test_whatever_is_written_is_parsed(text: str) -> None:
    found = parse(text, "img", ABSTAIN)
    assert found.questions or found.rejects


# ---------------------------------------------------------------- images that look alike


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20), st.integers(0, 15), st.integers(0, 20), st.randoms())
def test_near_finds_what_a_comparison_with_all_finds(
    hashes: list[int], distance: int, flips: int, rng: np.random.Generator
) -> None:
    near = Near(distance, hashes)
    value = hashes[0] if hashes else 0
    for bit in rng.sample(range(64), flips):  # type: ignore[attr-defined]
        value ^= 1 << bit
    within = [one for one in hashes if (one ^ value).bit_count() <= distance]
    assert (near.find(value) in within) if within else near.find(value) is None


def test_a_brighter_smaller_copy_looks_alike_and_another_image_does_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)
    copy = ImageEnhance.Brightness(image).enhance(1.1).resize((200, 200))
    other = Image.fromarray(pixels[::-1].copy()).resize((256, 256), Image.Resampling.BICUBIC)
    near = Near(6, [perceptual_hash(image)])
    assert near.find(perceptual_hash(copy)) is not None
    assert near.find(perceptual_hash(other)) is None


# ---------------------------------------------------------------- what is kept


def test_each_order_is_read_as_it_is_shown() -> None:
    question = Question(question_id="q", stem="What?", choices=("red", "blue", "green"), answer=1)
    (made,) = orders([question], 4)
    places = [shown(question, order, seen=False).index("blue") for order in made]
    assert sorted({*places}) == [0, 1, 2], "every place in turn"
    firsts = Counter(
        shown(other, orders([other], 1)[0][0], seen=False).index("blue")
        for number in range(300)
        for other in [replace(question, question_id=f"{number}/0")]
    )
    assert all(70 < firsts[place] < 130 for place in range(3)), "over images too"
    for order in made:
        for seen in (True, False):
            text = prompt(question, order, seen)
            letter = "ABC"[shown(question, order, seen).index("blue")]
            assert f"{letter}) blue" in text
            assert ("None of the above" in text) == seen
            assert is_right(question, order, seen, letter)
            assert is_right(question, order, seen, f"{letter}) blue")
            assert not is_right(question, order, seen, "D")
            assert not is_right(question, order, seen, "I cannot say")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Accuracy(1.0, 0.0), ""),
        (Accuracy(0.75, 0.0), "image_does_not_answer"),
        (Accuracy(1.0, 0.25), "answered_without_image"),
        (Accuracy(None, 0.0, 0.9), ""),
        (Accuracy(1.0, 0.0, 0.5), "caption_does_not_answer"),
        (Accuracy(), ""),
    ],
)
def test_the_rule(found: Accuracy, reason: str) -> None:
    assert refusal(found, CurateConfig()) == reason
