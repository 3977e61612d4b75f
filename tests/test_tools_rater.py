"""The tiny rater: what it is trained to answer is true, and can be read by who asks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_kit import load_tool

from caprl_async.data.examples import Example, read_examples
from caprl_async.judge.rating import parse_rating
from caprl_async.tiny import grammar
from caprl_async.tiny.grammar import Entity
from caprl_async.tiny.tokenizer import UNSEEN, build_tokenizer
from caprl_async.tiny.world import World

TOOL: Any = load_tool("small_rater")
WORLD = World("scene", (Entity("topleft", "red", "circle"), Entity("bottomright", "blue", "star")), 0)


@pytest.mark.parametrize(
    ("caption", "rating"),
    [
        ("topleft red circle . bottomright blue star .", (5, 5, 5)),
        ("", (5, 1, 5)),
        ("topleft red circle .", (5, 3, 5)),
        ("topleft red star . bottomright blue star .", (4, 4, 5)),
        ("topleft red circle . topright green cross .", (3, 3, 3)),
        ("first green two .", (1, 1, 1)),
        ("topleft red circle . topleft red circle .", (5, 3, 5)),
    ],
)
def test_ratings_follow_from_the_facts(caption: str, rating: tuple[int, ...]) -> None:
    names = ("factuality", "coverage", "no_hallucination")
    assert TOOL.true_rating(caption, WORLD) == dict(zip(names, rating, strict=True))


@given(st.integers(0, 10**6))
def test_rough_captions_are_of_the_tiny_language(seed: int) -> None:
    rng = random.Random(seed)
    caption = TOOL.rough_caption(TOOL.sample_world(rng), rng)
    assert set(caption.split()) <= {*grammar.all_words(), ":", "."}
    tokens = build_tokenizer()(caption).input_ids
    assert len(tokens) <= 40, "the ring's captions are no longer"


def test_the_rater_can_read_the_question_and_say_the_answer(tmp_path: Path) -> None:
    TOOL.write_ratings(tmp_path / "ratings.parquet", images=3, captions=4, seed=0)
    rows = [one for one in read_examples(tmp_path / "ratings.parquet") if isinstance(one, Example)]
    assert len(rows) == 12
    assert len({row.image for row in rows}) == 3
    words = build_tokenizer(TOOL.words())
    for row in rows:
        for text in (row.prompt, row.texts[0]):
            assert UNSEEN not in words.tokenize(text)
        said = words.decode(words(row.texts[0]).input_ids)
        right = [int(line.rpartition(" ")[2]) for line in row.texts[0].splitlines()]
        share = sum(w * (r - 1) / 4 for w, r in zip(TOOL.CRITERIA.values(), right, strict=True))
        assert parse_rating(str(said), TOOL.CRITERIA) == pytest.approx(share)
