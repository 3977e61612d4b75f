"""The table of reward hacking: what lies where to its band, and that the report says so."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.judge.monitors import MONITORS, Monitor
from caprl_async.observe import monitors
from caprl_async.observe.metrics import MetricsWriter
from caprl_async.observe.monitors import MonitorRow, State, monitor_rows
from caprl_async.observe.report import render

EVIL = "<script>alert(1)</script> & {{ 7 * 7 }}"


def make_run(folder: Path, bands: dict[str, Any] | None = None, **series: list[float]) -> Path:
    """A run folder with these metrics by step; `bands` stands in conf.yaml as it is."""
    steps = max((len(values) for values in series.values()), default=0)
    with MetricsWriter(folder) as writer:
        for i in range(steps):
            writer.write(i + 1, {name: values[i] for name, values in series.items() if i < len(values)})
    if bands is None:
        conf.dump(Config(run_dir=str(folder)), folder / "conf.yaml")
    else:
        (folder / "conf.yaml").write_text(json.dumps({"observe": {"bands": bands}}))
    return folder


def cells(page: str, name: str) -> tuple[list[str], str]:
    """Text of a monitor's cells in the page, and the class of the last."""
    section = page[page.index('<section id="hacking">') : page.index('<section id="alarms">')]
    (row,) = [row for row in re.findall(r"<tr>.*?</tr>", section, flags=re.DOTALL) if name in row]
    texts = [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<td.*?</td>", row)]
    (state,) = re.findall(r'class="state ([^"]*)"', row)
    return texts, state


def row_of(name: str, values: list[float | None], band: list[float] | None = None) -> MonitorRow:
    rows: list[dict[str, float | None]] = [{"step": i, name: value} for i, value in enumerate(values)]
    (found,) = [row for row in monitor_rows(rows, {} if band is None else {name: band}) if row.name == name]
    return found


def test_a_monitor_outside_its_band_at_the_end_is_red(tmp_path: Path) -> None:
    page = render(make_run(tmp_path, hack_answer_leak=[0.0, 0.02, 0.4], hack_meta=[0.2, 0.3, 0.05]))
    texts, state = cells(page, "hack_answer_leak")
    assert texts[2:] == ["0", "0.4", "0.4", "0 – 0.05", "outside"]
    assert state == "state-outside"
    assert re.search(r"td\.state-outside \{ background: var\(--alarm\)", page)
    assert re.search(r"--alarm: #b3261e", page)
    texts, state = cells(page, "hack_meta")
    assert texts[2:] == ["0.2", "0.05", "0.3", "0 – 0.1", "was outside"]
    assert state == "state-was-outside"


def test_a_monitor_in_its_band_is_not_marked(tmp_path: Path) -> None:
    page = render(make_run(tmp_path, hack_answer_leak=[0.01, 0.04, 0.0], hack_length_slope=[0.1, 9.0]))
    texts, state = cells(page, "hack_answer_leak")
    assert texts[2:] == ["0.01", "0", "0.04", "0 – 0.05", "in band"]
    assert state == "state-in-band"
    assert cells(page, "hack_length_slope")[0][2:] == ["0.1", "9", "–", "none", "no band"]
    assert 'class="state state-outside"' not in page
    assert 'class="state state-was-outside"' not in page


def test_what_is_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    page = render(make_run(tmp_path, hack_answer_leak=[0.01], missing_length_corr=[float("nan")] * 3))
    assert cells(page, "missing_length_corr")[0][2:] == ["–", "–", "–", "-0.3 – 0.3", "not measured"]
    assert cells(page, "gap_judges")[0][-1] == "not measured"
    assert cells(render(tmp_path / "nothing"), "hack_meta")[0][-1] == "not measured"


def test_the_band_is_that_of_the_run(tmp_path: Path) -> None:
    page = render(make_run(tmp_path, {"hack_meta": [0.2, 0.5], "hack_repetition": []}, hack_meta=[0.1]))
    assert cells(page, "hack_meta")[0][-2:] == ["0.2 – 0.5", "outside"]
    assert cells(page, "hack_repetition")[0][-2:] == ["none", "not measured"]
    assert cells(page, "hack_truncated")[0][-2] == "0 – 0.3"  # a run older than the monitor


@pytest.mark.parametrize(
    "bands", [{"hack_meta": EVIL}, {"hack_meta": [EVIL, 1]}, {"hack_meta": [1]}, EVIL, [1]]
)
def test_bands_that_are_none_fall_back_to_the_defaults(tmp_path: Path, bands: Any) -> None:
    page = render(make_run(tmp_path, bands, hack_meta=[0.5]))
    assert cells(page, "hack_meta")[0][-2:] == ["0 – 0.1", "outside"]
    assert "<script" not in page


def test_text_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = [dataclasses.replace(row_of("hack_meta", [0.5]), title=EVIL, meaning=EVIL, last=EVIL, band=EVIL)]
    monkeypatch.setattr("caprl_async.observe.report.monitor_rows", lambda rows, bands: evil)
    page = render(make_run(tmp_path, hack_meta=[0.5]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{ 7 * 7 }}") == 4


def test_the_monitors_have_a_chart(tmp_path: Path) -> None:
    page = render(make_run(tmp_path, hack_answer_leak=[0.01, 0.02], heldout_score=[0.4, 0.5]))
    section = page[page.index('<section id="hacking">') : page.index('<section id="alarms">')]
    assert section.count("<svg") == 1
    assert "answer leak <b>2 %</b>" in section
    assert "judge <b>50 %</b>" in page[: page.index('<section id="hacking">')]
    ids = re.findall(r' id="(clip[^"]*|p[0-9a-f]{10})"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("name", "values", "band", "worst", "state"),
    [
        ("hack_meta", [0.0, 0.05, 0.01], [0.0, 0.1], "0.05", State.IN_BAND),  # 0 is a share's own limit
        ("hack_meta", [0.3, 0.9, 0.0], [0.2, 1.0], "0", State.OUTSIDE),  # and so is 1
        ("hack_length_corr", [0.1, -0.8, 0.7], [-0.95, 0.95], "-0.8", State.IN_BAND),
        ("hack_length_corr", [0.96, -1.0, 0.7], [-0.95, 0.95], "-1", State.WAS_OUTSIDE),
        ("gap_heldout", [-0.6, 0.1, -0.2], [-1.0, 0.15], "0.1", State.IN_BAND),
        ("gap_heldout", [None, 0.15, None], [-1.0, 0.15], "0.15", State.IN_BAND),
        ("hack_meta", [0.5], [], "–", State.NO_BAND),
        ("hack_meta", [], [0.0, 0.1], "–", State.NOT_MEASURED),
    ],
)
def test_worst_is_farthest_outside_or_nearest_to_an_edge(
    name: str, values: list[float | None], band: list[float], worst: str, state: State
) -> None:
    row = row_of(name, values, band)
    assert (row.worst, row.state) == (worst, state)


def test_every_monitor_has_a_line_in_its_order() -> None:
    assert [row.name for row in monitor_rows([], {})] == [monitor.name for monitor in MONITORS]
    own = Monitor("x", "X", "An x.")
    (row,) = monitors.monitor_rows(
        [{"step": 1, "x": float("nan")}, {"step": 2, "x": 1}], {"x": [2, 3]}, [own]
    )
    assert (row.first, row.last, row.worst, row.state) == ("1", "1", "1", State.OUTSIDE)
