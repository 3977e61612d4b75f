"""Gold positions are balanced over questions, permutations and steps, and depend on seeds alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from judge_kit import question

from caprl_async.judge.permutations import balanced_orders, random_draws
from caprl_async.types import Question


def _questions(sizes: list[int], absent: list[bool]) -> list[Question]:
    return [
        question([f"c{j}" for j in range(size)], None if gone else i % size, f"q{i}")
        for i, (size, gone) in enumerate(zip(sizes, absent, strict=False))
    ]


@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=12),
    absent=st.lists(st.booleans(), min_size=12, max_size=12),
    rotation=st.integers(0, 10**6),
    permutations=st.integers(1, 8),
)
def test_orders_are_permutations_balanced_over_permutations(
    sizes: list[int], absent: list[bool], rotation: int, permutations: int
) -> None:
    questions = _questions(sizes, absent)
    orders = balanced_orders(questions, rotation, permutations)
    for one, mine in zip(questions, orders, strict=True):
        size = len(one.choices)
        assert len(mine) == permutations
        for order in mine:
            assert sorted(order) == list(range(size + 1))
            assert order[-1] == size  # the abstain option stands last
        if one.answer is not None:
            _assert_balanced([order.index(one.answer) for order in mine], size)


@given(
    size=st.integers(2, 6),
    count=st.integers(1, 30),
    rotation=st.integers(0, 10**6),
    permutations=st.integers(1, 3),
)
def test_gold_is_balanced_over_the_question_set_and_over_steps(
    size: int, count: int, rotation: int, permutations: int
) -> None:
    questions = _questions([size] * count, [False] * count)
    orders = balanced_orders(questions, rotation, permutations)
    for j in range(permutations):
        golds = [mine[j].index(q.answer) for q, mine in zip(questions, orders, strict=True)]
        _assert_balanced(golds, size)
    steps = [
        balanced_orders(questions, rotation + i, 1)[0][0].index(questions[0].answer) for i in range(size)
    ]
    assert sorted(steps) == list(range(size))


def _assert_balanced(positions: list[int], size: int) -> None:
    counts = Counter(dict.fromkeys(range(size), 0))
    counts.update(positions)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_other_choices_are_shuffled_too() -> None:
    one = [question(["a", "b", "c", "d"], 0)]
    orders = {balanced_orders(one, 4 * step, 1)[0][0] for step in range(50)}
    assert {order.index(0) for order in orders} == {0}
    assert len(orders) == 6


def test_orders_and_draws_repeat_exactly() -> None:
    """Values of one run: another process, machine or Python version must agree."""
    questions = _questions([4, 4, 3], [False, False, True])
    assert balanced_orders(questions, 7, 2) == (
        ((2, 3, 1, 0, 4), (0, 1, 3, 2, 4)),
        ((1, 0, 3, 2, 4), (3, 1, 2, 0, 4)),
        ((2, 1, 0, 3), (1, 2, 0, 3)),
    )
    first, second = random_draws(questions, 7, 2)
    assert (first.question, first.order, first.seed) == (1, (3, 1, 0, 2, 4), 3695787803293135024)
    assert (second.question, second.order, second.seed) == (1, (2, 0, 3, 1, 4), 1506745528116121900)
    assert random_draws(questions, 7, 8) != random_draws(questions, 8, 8)


def test_draws_are_uniform_over_questions_and_orders() -> None:
    questions = _questions([3, 3], [False, False])
    draws = random_draws(questions, 0, 6000)
    counts = Counter((draw.question, draw.order) for draw in draws)
    assert len(counts) == 2 * 6
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values())
    assert len({draw.seed for draw in draws}) == 6000
