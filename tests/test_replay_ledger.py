"""The ledger refuses what must not happen, survives a reopening and knows what a rollback voids."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from caprl_async.replay.events import Event, LedgerError
from caprl_async.replay.ledger import Ledger, audit_file
from caprl_async.types import Version

V = Version(0, 0)


def live(ledger: Ledger, index: int, *events: Event, attempt: int = 0) -> None:
    for event in events:
        detail = {"oldest": "0.0"} if event is Event.CUT else {"reason": "test"}
        ledger.record(f"train/{index}", index, attempt, event, V, **detail)


WHOLE = (Event.ADMITTED, Event.GENERATING, Event.JUDGING, Event.READY, Event.CUT, Event.TRAINED)


def test_a_whole_life_and_nothing_after_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    live(ledger, 0, *WHOLE)
    for event in WHOLE:
        with pytest.raises(LedgerError):
            live(ledger, 0, event)
    assert ledger.audit(0)["ended"] == {"trained": 1}


@pytest.mark.parametrize("skipped", range(1, 5))
def test_no_state_can_be_skipped(tmp_path: Path, skipped: int) -> None:
    ledger = Ledger(tmp_path / "l")
    with pytest.raises(LedgerError, match="cannot become"):
        live(ledger, 0, *WHOLE[:skipped], *WHOLE[skipped + 1 :])


def test_an_answer_of_an_older_attempt_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    live(ledger, 0, Event.ADMITTED, Event.GENERATING)
    live(ledger, 0, Event.RETRIED, Event.GENERATING, attempt=1)
    with pytest.raises(LedgerError):
        live(ledger, 0, Event.JUDGING, attempt=0)


def test_a_reopened_ledger_goes_on_where_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    live(ledger, 0, *WHOLE)
    live(ledger, 1, Event.ADMITTED, Event.GENERATING)
    ledger.journal("train/1", 0, "judging", b"captions")
    ledger.close()
    again = Ledger(tmp_path / "l")
    assert again.identity == ledger.identity
    assert vars(again.lives) == vars(ledger.lives)
    assert again.journalled() == {"train/1": (0, "judging", b"captions")}
    with pytest.raises(LedgerError, match="twice"):
        live(again, 0, Event.ADMITTED)
    live(again, 1, Event.JUDGING)


def test_a_rollback_voids_later_rows_and_keeps_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    live(ledger, 0, *WHOLE)
    live(ledger, 1, Event.ADMITTED, Event.GENERATING)
    position = ledger.position
    live(ledger, 1, *WHOLE[2:])
    live(ledger, 2, *WHOLE)
    ledger.roll_back(position, Version(1, 1))
    assert ledger.lives.live == {1: (Event.GENERATING, 0)}
    live(ledger, 2, *WHOLE)  # it was never admitted in what survives
    audit = ledger.audit(0)
    assert audit["violations"] == []
    assert audit["ended"] == {"trained": 2}
    ledger.close()
    with sqlite3.connect(tmp_path / "l") as rows:
        assert rows.execute("select count(*) from events where event = 'trained'").fetchone() == (4,)


def test_a_prompt_that_is_older_than_those_that_ended_keeps_its_place_when_they_are_folded(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "l")
    live(ledger, 0, *WHOLE)
    live(ledger, 1, Event.ADMITTED, Event.GENERATING)
    live(ledger, 2, *WHOLE)
    assert ledger.fold(ledger.position) == 1
    before = ledger.audit(0)
    assert (before["admitted"], before["outstanding"], before["ended"]) == (3, 1, {"trained": 2})
    assert before["violations"] == []
    ledger.close()
    again = Ledger(tmp_path / "l")
    live(again, 1, *WHOLE[2:])
    live(again, 3, *WHOLE)
    assert again.fold(again.position) == 3
    assert again.audit(0)["ended"] == {"trained": 4}
    again.roll_back(0, Version(1, 0))
    live(again, 0, *WHOLE)
    assert again.audit(0) == {**again.audit(0), "admitted": 1, "ended": {"trained": 1}, "violations": []}


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cut short or replaced"):
        Ledger(tmp_path / "l").roll_back(7, Version(1, 0))


def test_the_audit_finds_what_a_broken_hub_would_write(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    live(ledger, 0, *WHOLE)
    ledger.close()
    with sqlite3.connect(tmp_path / "l") as rows:
        rows.execute(
            "insert into events select seq + 1, time, key, 0, 0, event, version, detail "
            "from events where event = 'trained'"
        )
        rows.execute("update events set version = '0.9' where event = 'cut'")
    with pytest.raises(LedgerError):
        Ledger(tmp_path / "l")
    found = audit_file(tmp_path / "l", 2)["violations"]
    assert any("has ended" in text for text in found)
    assert any("is cut at 0.9" in text for text in found)


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("something else, long enough to be seen as no database at all" * 20)
    with pytest.raises(LedgerError, match=str(tmp_path)):
        Ledger(tmp_path / "l")


def test_a_step_is_written_once_and_again_after_the_run_has_begun_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    for _ in range(2):
        ledger.record_step(Version(0, 1), 1.0, 2.0)
    ledger.roll_back(0, V)
    for _ in range(2):
        ledger.record_step(Version(0, 1), 3.0, 4.0)
    assert [row.detail["started"] for row in ledger.rows() if row.event is Event.STEP] == [1.0, 3.0]
