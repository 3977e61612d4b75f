"""A letter is read only where an answer really begins with one."""

from __future__ import annotations

import pytest

from caprl_async.judge.letters import read_letter


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
