"""The simulation of the ring: against what can be said without it, and its rules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import scale_model
from scale_model import Broadcast, Design, Loads, Simulation

EVEN: dict[str, Any] = {"group_sigma": 0.0, "judge_sigma": 0.0, "train_sigma": 0.0}


def run(loads: Loads, design: Design, batches: int = 30) -> scale_model.Outcome:
    return Simulation(loads, design, seed=1).run(batches, batches // 3)


@pytest.mark.parametrize("slowest", ["group", "judge", "train"])
def test_without_chance_the_slowest_stage_sets_the_pace(slowest: str) -> None:
    times = {"group": 0.8, "judge": 0.8, "train": 0.1, slowest: 1.6 if slowest != "train" else 0.4}
    loads = Loads(**times, weights=0.0, **EVEN)
    found = run(loads, Design(1, 1, 1, 16, max_staleness=3))
    pace = 1 / max(loads.group / loads.lanes, loads.judge / loads.judge_lanes, loads.train)
    assert found.groups_per_s == pytest.approx(pace, rel=0.06)
    assert found.groups_per_s <= pace * 1.03


def test_at_lag_0_the_stages_take_turns() -> None:
    loads = Loads(group=0.8, judge=0.8, train=0.1, weights=0.0, **EVEN)
    found = run(loads, Design(1, 1, 1, 8, max_staleness=0))
    assert 8 / found.groups_per_s == pytest.approx(0.8 + 0.8 + 0.8, rel=0.02)
    assert found.staleness == 0


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_nothing_older_than_the_bound_is_trained_on(lag: int) -> None:
    loads = Loads(group=2.0, judge=0.5, train=0.05, weights=0.1, group_sigma=0.8)
    simulation = Simulation(loads, Design(4, 1, 1, 8, max_staleness=lag), seed=3)
    simulation.run(40, 5)
    assert max(simulation.ages) <= lag


def test_deaths_and_restarts_cost_what_was_under_way() -> None:
    loads = Loads(group=0.8, judge=0.1, train=0.01, weights=0.0)
    whole = run(loads, Design(4, 1, 1, 32, max_staleness=5))
    dying = Loads(group=0.8, judge=0.1, train=0.01, weights=0.0, mtbf=20.0, restart=5.0)
    broken = run(dying, Design(4, 1, 1, 32, max_staleness=5))
    assert broken.wasted > 0 == whole.wasted
    assert broken.groups_per_s < whole.groups_per_s


def test_broadcasts_differ_in_how_long_engines_wait() -> None:
    loads = Loads(group=1.0, judge=0.1, train=0.05, weights=0.2)
    syncs = {way: run(loads, Design(64, 8, 8, 512, broadcast=way)).sync_s for way in Broadcast}
    assert syncs[Broadcast.pipelined] < syncs[Broadcast.tree] < syncs[Broadcast.flat]
    assert syncs[Broadcast.flat] == pytest.approx(64 * 0.2)


def test_one_queue_process_is_a_bound_and_two_are_a_higher_one() -> None:
    loads = Loads(group=0.08, judge=0.08, train=0.001, weights=0.0, message=0.01)
    one, two = (run(loads, Design(8, 8, 8, 64, queues=number)) for number in (1, 2))
    assert one.groups_per_s == pytest.approx(1 / (3 * 0.01), rel=0.05), "three messages a group"
    assert two.groups_per_s > 1.5 * one.groups_per_s


def test_the_same_seed_gives_the_same() -> None:
    loads = Loads(group=1.0, judge=0.2, train=0.05, weights=0.1, mtbf=100.0, restart=1.0)
    one, other = (Simulation(loads, Design(2, 1, 1, 8), seed=5).run(20, 5) for _ in range(2))
    assert one == other
