"""The facts program on captions written by hand, and on anything at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.tiny import grammar
from caprl_async.tiny.facts import FactScore, score_facts

FACTS = json.dumps(
    {
        "domain": "scene",
        "entities": [
            {"place": "topleft", "color": "red", "value": "circle"},
            {"place": "bottomright", "color": "blue", "value": "star"},
        ],
    }
)
SIGN = json.dumps(
    {
        "domain": "sign",
        "entities": [
            {"place": "board", "color": "white", "value": "circle"},
            {"place": "border", "color": "red", "value": None},
            {"place": "arrow", "color": "black", "value": "left"},
        ],
    }
)


@pytest.mark.parametrize(
    ("caption", "stated", "correct"),
    [
        ("", 0, 0),
        ("topleft red circle .", 2, 2),
        ("topleft : red circle . bottomright : blue star .", 4, 4),
        ("red circle topleft . blue bottomright .", 3, 3),
        ("topleft red circle . topleft red circle . topleft red .", 2, 2),  # repeated facts count once
        ("topleft red circle . topright green star .", 4, 2),  # invented things are stated and wrong
        ("topleft red . topleft blue .", 2, 1),  # both of two contradicting facts are stated
        ("topleft blue star . bottomright red circle .", 4, 0),  # mixed up
        ("red circle .", 0, 0),  # nobody knows where
        ("topleft red circle bottomright blue star", 4, 4),  # no full stops
        ("topleft topleft . circle . the of ?", 0, 0),
        ("the topleft shows a red circle .", 2, 2),  # the judges' own wordings are read too
        ("there is star of hue blue in the bottomright spot .", 2, 2),
    ],
)
def test_counts(caption: str, stated: int, correct: int) -> None:
    score = score_facts(caption, FACTS)
    assert score == FactScore(stated, correct, 4)
    assert score.recall == correct / 4
    assert score.precision == (correct / stated if stated else 1.0)


def test_a_border_has_no_second_fact() -> None:
    caption = "board white circle . border red . arrow black left ."
    assert score_facts(caption, SIGN) == FactScore(5, 5, 5)
    assert score_facts("border red circle .", SIGN) == FactScore(2, 1, 5)


@given(st.text(max_size=200))
def test_any_text_is_scored(text: str) -> None:
    score = score_facts(text, FACTS)
    assert 0 <= score.correct <= min(score.stated, score.total)


@given(st.lists(st.sampled_from([*grammar.all_words(), ".", ":", "\n", "?"]), max_size=40))
def test_any_words_are_scored_and_repeating_them_changes_nothing(words: list[str]) -> None:
    text = " ".join(words)
    score = score_facts(text, SIGN)
    assert 0 <= score.correct <= min(score.stated, score.total)
    assert score_facts(f"{text} . {text}", SIGN) == score
