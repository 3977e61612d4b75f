"""How the captions of an update are shared out: every one once, within the budget, in balance, in step."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
import torch
from family_kit import PATCH_VALUES, captions_of, tiny_family
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from caprl_async.config import Prefix
from caprl_async.data.processor import Grid
from caprl_async.learner.batch import TrainSequence
from caprl_async.learner.model import SHARED_FAMILIES
from caprl_async.learner.plan import Costs, Plan, costs_of, make_plan

GRIDS: list[Grid] = [(1, 4, 4), (1, 8, 8)]
SHARED = Costs(Prefix.shared, pair=0.002, patch=0.3, scored=0.1)
REPEATED = Costs(Prefix.repeated, pair=0.002, patch=0.3, scored=0.1)

shapes = st.lists(
    st.tuples(
        st.lists(st.sampled_from(GRIDS), min_size=1, max_size=1),
        st.integers(1, 30),
        st.lists(st.integers(1, 40), min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=10,
)


def trained(plan: Plan) -> Counter[str]:
    return Counter(s.name for micro in plan.micros for s in micro if s.weight)


@given(shapes, st.integers(1, 4), st.integers(30, 600), st.sampled_from([SHARED, REPEATED]))
def test_each_caption_is_computed_once_within_the_budget_and_ranks_keep_in_step(
    shapes: list[tuple[list[Grid], int, list[int]]], ranks: int, budget: int, costs: Costs
) -> None:
    sequences = captions_of(shapes)
    plan = make_plan(sequences, ranks, budget, costs)
    assert len(plan.ranks) == ranks
    assert len({len(rank) for rank in plan.ranks}) == 1
    assert trained(plan) == Counter(s.name for s in sequences)
    fillers = [s for micro in plan.micros for s in micro if not s.weight]
    assert len(fillers) == plan.fillers <= max(0, ranks - 1)
    assert all(costs.tokens(micro) <= budget or len(micro) == 1 for micro in plan.micros)
    if costs is SHARED:
        assert (plan.padding == 0) == (plan.fillers == 0)


@given(shapes, st.integers(1, 4))
def test_a_group_shares_one_prompt_unless_the_budget_or_the_ranks_forbid(
    shapes: list[tuple[list[Grid], int, list[int]]], ranks: int
) -> None:
    sequences = captions_of(shapes)
    plan = make_plan(sequences, ranks, 10_000, SHARED)
    parts = sum(len(list(groupby(micro, key=lambda s: s.group))) for micro in plan.micros)
    assert parts - len(shapes) <= 2 * (ranks - 1)  # up to `ranks - 1` cuts for balance, as many to keep step
    prompts = sum(len(group[0].prompt) for group in groups(sequences))
    if ranks == 1:
        assert plan.tokens == prompts + sum(len(s.caption) for s in sequences)


def groups(sequences: list[TrainSequence]) -> list[list[TrainSequence]]:
    return [list(members) for _, members in groupby(sequences, key=lambda s: s.group)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("costs", [SHARED, REPEATED], ids=["shared", "repeated"])
def test_ranks_get_about_equal_work(ranks: int, costs: Costs) -> None:
    lengths = [[5 + 7 * (i * j % 11) for j in range(8)] for i in range(1, 25)]
    sequences = captions_of([([GRIDS[i % 2]], 3 + i % 5, line) for i, line in enumerate(lengths)])
    plan = make_plan(sequences, ranks, 1200, costs)
    work = [sum(map(costs.work, rank)) for rank in plan.ranks]
    assert max(work) <= 1.1 * sum(work) / ranks
    if costs is SHARED:
        for round_ in zip(*plan.ranks, strict=True):  # they wait for each other in each
            assert max(map(costs.work, round_)) <= 1.35 * min(map(costs.work, round_))


def test_the_largest_group_is_cut_when_ranks_would_wait_for_it() -> None:
    three = captions_of([([GRIDS[0]], 4, [30] * 8) for _ in range(3)])
    plan = make_plan(three, 2, 10_000, SHARED)
    assert plan.fillers == 0
    assert sorted(len(micro) for micro in plan.micros) == [12, 12]


def test_a_filler_is_needed_only_when_captions_are_fewer_than_ranks() -> None:
    two = captions_of([([GRIDS[0]], 4, [3, 3])])
    for costs in (SHARED, REPEATED):
        assert make_plan(two, 2, 100, costs).fillers == 0
        plan = make_plan(two, 3, 100, costs)
        assert plan.fillers == 1
        assert plan.padding > 0


def test_repeated_rows_of_like_length_stand_together() -> None:
    captions = captions_of([([GRIDS[0]], 4, [40, 1, 39, 2]), ([GRIDS[0]], 4, [41, 3, 38, 1])])
    budget = 4 * max(s.length for s in captions)
    plan = make_plan(captions, 1, budget, REPEATED)
    assert plan.padding < 0.1
    assert plan.tokens == sum(len(m) * max(s.length for s in m) for m in plan.micros)


def test_costs_count_what_a_model_multiplies() -> None:
    """Against torch's own counter of multiplications."""
    model = tiny_family("qwen2_5_vl")
    costs = costs_of(model, Prefix.shared)
    text = model.model.language_model
    text.set_attn_implementation("eager")  # the counter does not know the CPU's flash kernel
    matrices = sum(p.numel() for name, p in text.named_parameters() if p.ndim == 2 and "embed" not in name)

    def flops(length: int) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            text(inputs_embeds=torch.zeros(1, length, 32), use_cache=False)
        return counter.get_total_flops() / 2 / matrices

    for length in (16, 64):
        # Eager attention computes all pairs, a causal one every second.
        assert length + costs.pair * length**2 == pytest.approx(flops(length), rel=0.01)
    assert costs.scored == 60 * 32 / matrices
    assert costs.unit == matrices


@pytest.mark.parametrize("kind", SHARED_FAMILIES)
def test_costs_count_what_a_tower_multiplies(kind: str) -> None:
    model = tiny_family(kind)
    costs = costs_of(model, Prefix.shared)
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # it does not know the flash kernel
        model.model.visual(torch.zeros(48, PATCH_VALUES), grid_thw=torch.tensor([[1, 6, 8]]))
    assert 48 * costs.patch * costs.unit == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_a_group_beyond_the_budget_is_cut_into_as_few_parts_as_fit() -> None:
    sequences = captions_of([([GRIDS[0]], 4, [10] * 16)])
    prompt = len(sequences[0].prompt)
    plan = make_plan(sequences, 1, prompt + 60, SHARED)
    assert sorted(len(micro) for micro in plan.micros) == [4, 6, 6]
