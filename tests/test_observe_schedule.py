"""The report's schedule: whose bars, how long, in which lanes; and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_observe_report import make_run

from caprl_async import conf
from caprl_async.observe.diary import note, read_diary
from caprl_async.observe.drawings import gantt, latencies, staleness
from caprl_async.observe.environment import read_environment, write_environment
from caprl_async.observe.report import write_report
from caprl_async.observe.schedule import JUDGES, LEARNER, Bar, Schedule, lanes, percentiles, schedule
from caprl_async.replay.events import Event, EventRow
from caprl_async.types import Version


def _rows() -> list[EventRow]:
    """Two groups that one step trains on, and one that is thrown away."""
    rows: list[EventRow] = []

    def add(event: Event, key: str, time: float, step: int = 0, **detail: Any) -> None:
        rows.append(EventRow(len(rows), key, 0, 0, event, Version(0, step), detail, time))

    for i, key in enumerate("ab"):
        add(Event.JUDGING, key, 12.0, peer=f"rollout-{i}", started=10.0 + i, finished=12.0)
        add(Event.READY, key, 15.0)
        add(Event.CUT, key, 16.0, at=16.0)
    add(Event.JUDGING, "c", 13.0, peer="rollout-0", started=11.0, finished=13.0)
    add(Event.EVICTED, "c", 14.0, reason="filtered")
    for key in "ab":
        add(Event.TRAINED, key, 20.0)
    add(Event.STEP, "", 20.0, step=1, started=16.0, finished=20.0)
    return rows


def test_bars_and_latencies_are_those_of_the_ledger() -> None:
    found = schedule(_rows())
    assert Counter(bar.who for bar in found.bars) == {JUDGES: 3, "rollout-0": 2, "rollout-1": 1, LEARNER: 1}
    assert Bar("rollout-1", 11.0, 12.0, 1) in found.bars
    assert Bar("rollout-0", 11.0, 13.0, None) in found.bars
    assert found.latencies["captioned"] == [2.0, 1.0]
    assert found.latencies["judged"] == [3.0, 3.0]
    assert found.latencies["waited for its batch"] == [1.0, 1.0]
    assert found.latencies["trained"] == [4.0, 4.0]
    assert found.latencies["whole"] == [10.0, 9.0]
    assert found.window(6) == (16.0, 20.0)


def test_a_rollback_voids_bars() -> None:
    rows = _rows()
    back = EventRow(len(rows), "", None, None, Event.EPOCH, Version(1, 0), {"voids_after": -1}, 21.0)
    assert schedule([*rows, back]).bars == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_bars_of_a_lane_never_overlap_and_lanes_are_as_few_as_can_be(spans: list[tuple[int, int]]) -> None:
    bars = [Bar("x", start, start + length, None) for start, length in sorted(spans)]
    used = lanes(bars)
    for i, one in enumerate(bars):
        for j in range(i):
            assert used[i] != used[j] or bars[j].finished <= one.started
    most = max((sum(b.started <= t < b.finished for b in bars) for t in range(80)), default=0)
    assert len(set(used)) == most


def test_percentiles_of_few_and_many() -> None:
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([float(i) for i in range(101)]) == pytest.approx((50.0, 95.0, 99.0))


def test_pictures_name_every_actor_and_there_are_none_of_nothing() -> None:
    names = ("rollout-0", "rollout-1", JUDGES, LEARNER)
    picture = gantt(Schedule([Bar(who, 1.0, 2.0, 7) for who in names], {}))
    for who in (*names, "7", "seconds"):
        assert f">{who}<" in picture
    assert [chart.legend[0][2] for chart in latencies(schedule(_rows()))] == [
        *("1.50 s", "3.00 s", "1.00 s", "4.00 s", "9.50 s")
    ]
    assert (gantt(schedule([])), latencies(schedule([])), staleness([])) == ("", [], None)
    found = staleness([{"staleness_share_0": 0.25, "staleness_share_2": 0.75}])
    assert found is not None
    assert found.legend == ((0, "mean", "1.50"),)


def test_the_diary_and_the_environment_are_kept(tmp_path: Path) -> None:
    note(tmp_path, "rollout-0 died; starting it again")
    with (tmp_path / "diary.jsonl").open("a") as file:
        file.write('{"time": 3, "te')  # the driver was killed
    assert [text for _, text in read_diary(tmp_path)] == ["rollout-0 died; starting it again"]
    assert read_environment(tmp_path) == {}
    write_environment(tmp_path)
    assert {"machine", "cores", "memory", "GPUs", "Python", "ray", "torch"} <= set(read_environment(tmp_path))


def test_a_live_runs_page_loads_itself_again_and_a_finished_ones_does_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=1, steps=3)
    assert 'http-equiv="refresh"' in write_report(folder, going_on=True).read_text()
    assert 'http-equiv="refresh"' not in write_report(folder).read_text()
    assert not conf.is_going_on(folder)
    (folder / ".lock").touch()
    assert not conf.is_going_on(folder)


_MEASURE = """<body><iframe id=f style="width:{width}px;height:800px;border:0" src="report.html"></iframe>
<script>f.onload = () => {{
  const page = f.contentDocument;
  const boxes = s => [...page.querySelectorAll(s)].map(e => e.getBoundingClientRect());
  document.body.innerText = JSON.stringify({{
    wide: page.documentElement.scrollWidth,
    sections: boxes("section").map(b => b.height),
    pictures: boxes("svg").map(b => b.width),
    shown: [...page.images].map(i => i.naturalWidth),
  }});
}};</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1240], ids=["phone", "desk"])
def test_the_page_fits_its_window(tmp_path: Path, width: int) -> None:
    folder = make_run(tmp_path / "run", images=2, steps=5)
    write_report(folder)
    (folder / "measure.html").write_text(_MEASURE.format(width=width))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    browser += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [*browser, f"file://{folder / 'measure.html'}"], capture_output=True, text=True, timeout=120
    )
    found = json.loads(re.search(r"<body>(\{.*\})</body>", done.stdout)[1])  # type: ignore[index]
    assert found["wide"] <= width, "nothing but tables and the schedule needs a push to the side"
    assert all(found["sections"])
    assert all(0 < picture <= width for picture in found["pictures"])
    assert all(found["shown"])
