"""Decides, from seeds alone, in which order a question's options are shown; the same for a whole group.

An **order** lists option indices as shown: option i is `choices[i]`, the last index is the abstain option.
As in the paper the abstain option stands last in every order, so that only choices change places.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from caprl_async.types import Question

Order: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Draw:
    """One draw of the paper's reward: which question, its options' order, and a seed for the answer."""

    question: int
    order: Order
    seed: int


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone (Python's own hash changes from process to process)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rotation_of(questions: Sequence[Question]) -> int:
    """For `balanced_orders` of an image whose number nobody knows; the same whatever is asked of it."""
    return seed_of("rotation", questions[0].question_id) % 2**31 if questions else 0


def balanced_orders(
    questions: Sequence[Question], rotation: int, permutations: int
) -> tuple[tuple[Order, ...], ...]:
    """`permutations` orders for each question: `[question][permutation]`.

    The gold choice of the k-th question (counted among those with the same number K of choices) stands at
    `(k + j + rotation) mod K` in permutation j: a Latin square. So over any set of questions, over j and over
    successive rotations each position holds the gold equally often, give or take one. The other choices are
    shuffled by (question id, rotation, j). Where the abstain option is the answer, all choices are shuffled.
    """
    rank: Counter[int] = Counter()
    orders = []
    for question in questions:
        size = len(question.choices)
        start = rank[size] + rotation
        if question.answer is not None:
            rank[size] += 1
        seeds = [seed_of("order", question.question_id, rotation, j) for j in range(permutations)]
        orders.append(tuple(_order(question, start + j, seed) for j, seed in enumerate(seeds)))
    return tuple(orders)


def random_draws(questions: Sequence[Question], rotation: int, draws: int) -> tuple[Draw, ...]:
    """`draws` questions drawn uniformly with replacement, the choices of each shuffled anew (as the paper).

    All captions of a group meet the same draws: each caption's reward has the paper's distribution, and their
    differences are not blurred by one caption meeting harder questions than another.
    """
    names = [question.question_id for question in questions]
    rng = random.Random(seed_of("draws", rotation, *names))
    drawn = []
    for _ in range(draws if questions else 0):
        index = rng.randrange(len(questions))
        order = list(range(len(questions[index].choices)))
        rng.shuffle(order)
        drawn.append(Draw(index, (*order, len(order)), rng.getrandbits(63)))
    return tuple(drawn)


def _order(question: Question, position: int, seed: int) -> Order:
    """Puts the gold choice at `position` (taken mod K) and shuffles the others around it."""
    size = len(question.choices)
    others = [index for index in range(size) if index != question.answer]
    random.Random(seed).shuffle(others)
    if question.answer is not None:
        others.insert(position % size, question.answer)
    return (*others, size)
