"""What the terminal, or a log file, says while a run is on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from caprl_async.observe import names
from caprl_async.observe.progress import Progress, duration

METRICS = {
    names.REWARD: 0.4123,
    names.ACCURACY: 0.456,
    names.CAPTIONS_PER_S: 31.25,
    names.LENGTH: 17.4,
    names.STALENESS: 1.31,
    "queue_generating": 12.0,
    "queue_judging": 3.0,
    "queue_ready": 5.0,
    "idle_rollout": 0.05,
    "idle_judge": 0.4,
    names.WAIT_S: 1.0,
    names.STEP_S: 3.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _plain(steps: int, clock: Clock) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(steps, Console(file=out, force_terminal=False, width=300), clock=clock), out


def test_a_file_gets_plain_lines_with_everything_a_person_follows() -> None:
    clock = Clock()
    progress, out = _plain(60, clock)
    with progress:
        clock.now += 2
        progress.show(1, METRICS)
    assert out.getvalue() == (
        "step 1 of 60 | reward 0.412 | QA accuracy 45.6% | captions/s 31.2 | tokens/caption 17.4 | "
        "staleness 1.31 | queue 12 generating, 3 judging, 5 ready | "
        "idle rollout 5%, judge 40%, learner 25% | 1 min 58 s left\n"
    )


def test_quick_steps_do_not_flood_a_file_but_the_last_is_always_shown() -> None:
    clock = Clock()
    progress, out = _plain(30, clock)
    with progress:
        for step in range(1, 31):
            clock.now += 1
            progress.show(step, METRICS)
    steps = [int(line.split()[1]) for line in out.getvalue().splitlines()]
    assert steps == [1, 11, 21, 30]


def test_metrics_that_are_missing_are_left_out() -> None:
    progress, out = _plain(2, Clock())
    with progress:
        progress.show(1, {})
    assert out.getvalue().startswith("step 1 of 2")
    assert "reward" not in out.getvalue()


@pytest.mark.parametrize(("first", "left"), [(1, 40.0), (31, 40.0)])
def test_time_left_follows_the_speed_also_after_a_resume(first: int, left: float) -> None:
    clock = Clock()
    progress, _ = _plain(first + 29, clock)
    for step in range(first, first + 10):
        clock.now += 2
        progress.show(step, {})
    assert progress.seconds_left() == pytest.approx(left)


def test_a_terminal_gets_a_panel() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Progress(60, console) as progress:
        progress.show(3, METRICS)
    assert "step 3 of 60" in out.getvalue()
    assert "rollout 5%, judge 40%, learner 25%" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
