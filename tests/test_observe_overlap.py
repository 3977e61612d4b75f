"""The share of steps that overlap generation which is trained on later."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.observe.overlap import Span, overlap_from_ledger, overlap_share
from caprl_async.replay.events import Event
from caprl_async.replay.ledger import Ledger
from caprl_async.types import Version


def test_a_synchronous_run_has_none() -> None:
    steps = [(k, 10.0 * k + 5, 10.0 * k + 10) for k in range(1, 6)]
    groups = [(k, 10.0 * k, 10.0 * k + 5) for k in range(1, 6)]  # each just before its own step
    assert overlap_share(steps, groups) == 0.0


def test_generation_for_a_later_step_counts_and_for_the_same_step_does_not() -> None:
    steps = [(1, 0.0, 10.0), (2, 10.0, 20.0)]
    assert overlap_share(steps, [(2, 5.0, 9.0)]) == 0.5
    assert overlap_share(steps, [(1, 5.0, 9.0), (2, 12.0, 15.0)]) == 0.0
    assert overlap_share(steps, [(3, 5.0, 15.0)]) == 1.0


def test_without_steps_it_is_zero() -> None:
    assert overlap_share([], [(1, 0.0, 1.0)]) == 0.0


_SPANS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(0, 9)).map(
        lambda t: (t[0], float(t[1]), float(t[1] + t[2]))
    ),
    max_size=8,
)


@given(steps=_SPANS, groups=_SPANS)
def test_it_equals_the_definition(steps: list[Span], groups: list[Span]) -> None:
    hits = [
        any(
            g > s and max(begin, started) < min(end, finished)
            for g, started, finished in groups
            if finished > started
        )
        for s, begin, end in steps
    ]
    solid = [group for group in groups if group[2] > group[1]]
    lasting = [step for step in steps if step[2] > step[1]]
    expected = [hit for hit, step in zip(hits, steps, strict=True) if step[2] > step[1]]
    assert overlap_share(lasting, solid) == pytest.approx(sum(expected) / len(expected) if expected else 0.0)


def _group(ledger: Ledger, index: int, batch: Version, started: float, finished: float) -> None:
    key = f"train/{index}"
    ledger.record(key, index, 0, Event.ADMITTED, batch, row_id="r")
    ledger.record(key, index, 0, Event.GENERATING, batch, peer="rollout-0")
    ledger.record(
        key, index, 0, Event.JUDGING, batch, peer="judge-0", started=started, finished=finished, tokens=3
    )
    ledger.record(key, index, 0, Event.READY, batch, rewards=[])
    ledger.record(key, index, 0, Event.CUT, batch, oldest=str(batch))
    ledger.record(key, index, 0, Event.TRAINED, batch)


def test_a_ledger_is_read_and_voided_steps_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    _group(ledger, 0, Version(0, 0), 0.0, 10.0)
    ledger.record_step(Version(0, 1), 10.0, 20.0)
    position = ledger.position
    _group(ledger, 1, Version(0, 1), 12.0, 18.0)
    ledger.record_step(Version(0, 2), 20.0, 30.0)
    ledger.commit()
    assert overlap_from_ledger(path) == 0.5  # group 1 was generated during step 1, trained on in step 2
    ledger.roll_back(position, Version(1, 1))
    ledger.commit()
    assert overlap_from_ledger(path) == 0.0  # step 2 never happened
    ledger.close()


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ledger\.sqlite"):
        overlap_from_ledger(tmp_path / "ledger.sqlite")
