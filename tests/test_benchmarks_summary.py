"""Means over captions, items, circles and categories, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.summary import difference, summarise
from caprl_async.types import ImageRef


def item(name: str, image: str = "", category: str = "", circle: str = "") -> Item:
    return Item(
        name,
        (ImageRef(sha256=image or name, path="/x"),),
        "?",
        ("A",),
        Rule.EXACT,
        category=category,
        circle=circle,
    )


def test_mean_and_best_of_k() -> None:
    found = summarise([item("1"), item("2")], {"1": [1.0, 0.0], "2": [0.0, 0.0]})
    assert found is not None
    assert (found.items, found.images, found.unscored) == (2, 2, 0)
    assert (found.mean.mean, found.best) == (0.25, 0.5)


def test_what_was_not_scored_is_in_no_mean() -> None:
    found = summarise([item("1"), item("2"), item("3")], {"1": [1.0, None], "2": [None, None]})
    assert found is not None
    assert (found.mean.mean, found.items, found.unscored) == (1.0, 1, 2)
    assert summarise([item("1")], {}) is None


def test_a_circle_is_right_only_as_a_whole() -> None:
    items = [item("1", circle="1"), item("1000001", "1", circle="1"), item("2", circle="2")]
    found = summarise(items, {"1": [1.0], "1000001": [0.0], "2": [1.0]})
    assert found is not None
    assert (found.items, found.mean.mean) == (2, 0.5)


def test_a_difference_is_paired() -> None:
    """Images differ far more than the captioners do: only the paired interval tells that one is better."""
    rng = np.random.default_rng(0)
    items = [item(str(number)) for number in range(60)]
    one = {str(number): [float(value)] for number, value in enumerate(rng.integers(0, 2, 60))}
    other = {name: [score + 0.1 + rng.normal(0, 0.02)] for name, (score,) in one.items()}
    better, alone = difference(items, one, other), summarise(items, other)
    assert better is not None
    assert alone is not None
    assert better.low is not None
    assert better.high is not None
    assert alone.mean.low is not None
    assert better.mean == pytest.approx(0.1, abs=0.01)
    assert 0.08 < better.low < better.high < 0.12
    assert alone.mean.mean - alone.mean.low > 0.08
    assert difference(items, one, {"1": [None]}) is None
    only = difference(items, one, {"1": [one["1"][0] + 0.5], "2": [None]})
    assert only is not None
    assert only.mean == pytest.approx(0.5)


def test_the_mean_of_categories() -> None:
    items = [item(str(number), category="a" if number < 3 else "b") for number in range(4)]
    scores = {"0": [1.0], "1": [1.0], "2": [1.0], "3": [0.0]}
    micro, macro = summarise(items, scores), summarise(items, scores, macro=True)
    assert micro is not None
    assert macro is not None
    assert (micro.mean.mean, macro.mean.mean) == (0.75, 0.5)
    assert micro.categories == {"a": 1.0, "b": 0.0}


def test_the_interval_is_one_over_images() -> None:
    """200 questions about 20 images tell as much as 20 questions, if they agree within each image."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 20).astype(float)
    many = [item(f"{i}/{j}", str(i)) for i in range(20) for j in range(10)]
    few = [item(f"{i}/0", str(i)) for i in range(20)]
    scores = {f"{i}/{j}": [float(right[i])] for i in range(20) for j in range(10)}
    one, other = summarise(many, scores), summarise(few, scores)
    assert one is not None
    assert other is not None
    assert one.mean == other.mean
    assert one.mean.low is not None
    assert one.mean.high is not None
    width = one.mean.high - one.mean.low
    assert width == pytest.approx(2 * 1.96 * right.std() / 20**0.5, rel=0.15)
    assert one == summarise(many, scores)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_mean_is_that_of_the_items(drawn: list[tuple[int, float]]) -> None:
    items = [item(str(number), str(image)) for number, (image, _) in enumerate(drawn)]
    found = summarise(items, {str(number): [value] for number, (_, value) in enumerate(drawn)})
    assert found is not None
    assert found.mean.mean == pytest.approx(np.mean([value for _, value in drawn]))
    if found.mean.low is not None and found.mean.high is not None:
        assert found.mean.low <= found.mean.high
