"""A letter is read only where an answer begins with one, an option only where it is all that is said."""

from __future__ import annotations

import pytest

from caprl_async.judge.letters import read_letter, read_option


@pytest.mark.parametrize(
    ("text", "index"),
    [("A", 0), (" B", 1), ("C)", 2), (" D. red", 3), ("B: blue", 1), ("E) Can not answer", 4), ("\nA\n", 0)],
)
def test_a_leading_letter_counts(text: str, index: int) -> None:
    assert read_letter(text, 5) == index


@pytest.mark.parametrize(
    "text",
    [
        "According to the caption, B",
        "Based on the caption",
        "I cannot tell",
        "Can not answer",
        "The answer is B",
        "AB",
        "A-B",
        "a)",
        "F)",  # no such option
        "(A)",
        "<|image_pad|>A",
        "",
        "   ",
    ],
)
def test_anything_else_is_no_letter(text: str) -> None:
    assert read_letter(text, 5) is None


OPTIONS = ("red circle", "blue", "the answer", "-1", "1", "C++", "Can not answer based on the caption")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Red circle.", 0),
        (" a red circle", 0),
        ("It is a red circle!\nBecause the caption says so.", 0),
        ("The answer is: blue", 1),
        ("**Blue**", 1),
        ("-1", 3),
        ("1.", 4),
        ("c++", 5),
        ("Can not answer based on the caption.", 6),
    ],
)
def test_an_option_said_in_other_words_around_it_counts(text: str, index: int) -> None:
    assert read_option(text, OPTIONS) == index


@pytest.mark.parametrize(
    "text",
    ["red", "not blue", "blue or red circle", "red circles", "+1", "11", "C", "", "\nblue", "bluish"],
)
def test_anything_more_or_less_is_no_option(text: str) -> None:
    assert read_option(text, OPTIONS) == (1 if text.strip() == "blue" else None)


def test_two_options_that_read_alike_are_no_answer() -> None:
    assert read_option("a dog", ("dog", "the dog")) is None
