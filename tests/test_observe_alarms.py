"""Alarms begin and end once, are kept, and reach the report."""

from __future__ import annotations

import math
from pathlib import Path

from caprl_async.config import BandsConfig
from caprl_async.observe.alarms import Alarms, read_alarms
from caprl_async.observe.report import render


def test_an_alarm_is_said_when_it_begins_and_when_it_ends(tmp_path: Path) -> None:
    alarms = Alarms(BandsConfig(effective_samples=[0.5, 1.0]), tmp_path)
    values = [0.9, 0.4, 0.3, math.nan, 0.6, 0.7]
    said = [alarms.check(step, {"effective_samples": value}) for step, value in enumerate(values)]
    assert [len(texts) for texts in said] == [0, 1, 0, 0, 1, 0]
    assert "step 1: effective_samples is 0.4, outside observe.bands.effective_samples=[0.5, 1]" in said[1]
    assert [line["inside"] for line in read_alarms(tmp_path)] == [False, True]
    assert alarms.raised == 0


def test_what_is_not_measured_and_what_has_no_band_raises_nothing(tmp_path: Path) -> None:
    alarms = Alarms(BandsConfig(clip_fraction=[]), tmp_path)
    assert alarms.check(1, {"clip_fraction": 1.0, "reward_mean": 9.0}) == []
    assert read_alarms(tmp_path) == []


def test_infinity_is_outside_and_is_kept_as_valid_json(tmp_path: Path) -> None:
    alarms = Alarms(BandsConfig(), tmp_path)
    assert len(alarms.check(3, {"importance_mean": math.inf})) == 1
    assert read_alarms(tmp_path)[0]["value"] == "inf"
    assert alarms.raised == 1
    page = render(tmp_path)
    assert "importance_mean" in page
    assert "left its band" in page
