"""The benchmarks of the asynchronous ring and of weight syncs: their stand-ins and their arithmetic."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.types import Version

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.append(str(TOOLS))

import bench_async  # noqa: E402
import bench_weights  # noqa: E402
from bench_async import Used, bound, overhead, split  # noqa: E402
from emulated_ring import Device, Times, luck, share, version_spans  # noqa: E402

TIMES = Times(rollout=1.0, judge=0.6, train=0.8, snapshot=0.05, publish=0.05)


def test_luck_is_repeatable_and_one_on_average() -> None:
    drawn = [luck(0.3, f"group {i}") for i in range(4000)]
    assert luck(0.3, "group 7") == drawn[7]
    assert statistics.fmean(drawn) == pytest.approx(1.0, abs=0.02)
    assert min(drawn) < 0.7
    assert max(drawn) > 1.5


def test_all_groups_of_a_batch_take_as_long_as_the_stage() -> None:
    groups = [TIMES.group(TIMES.judge, 64, str(i)) for i in range(64 * 50)]
    assert sum(groups) / 50 / TIMES.lanes == pytest.approx(TIMES.judge, rel=0.03)


def test_the_bound_counts_a_transfer_to_the_rollout_and_a_copy_to_the_learner() -> None:
    whole, slowest = bound(TIMES)
    assert (whole, slowest) == (pytest.approx(2.5), pytest.approx(1.05))


def test_a_device_works_on_so_many_pieces_at_once_and_a_stop_holds_them_up() -> None:
    async def whole() -> tuple[Device, float]:
        device, began = Device(2), time.time()
        work = [asyncio.create_task(device.work(0.1)) for _ in range(4)]
        await asyncio.sleep(0.05)
        await device.stop(0.1)
        await asyncio.gather(*work)
        return device, time.time() - began

    device, seconds = asyncio.run(whole())
    assert 0.3 - 0.001 <= seconds < 0.6  # two rounds of two pieces, and the stop
    assert len(device.spans) == 4
    assert sum(worked for *_, worked in device.spans) == pytest.approx(0.4)


def test_shares_count_only_what_lies_within_the_window() -> None:
    spans = [(0.0, 2.0, 2.0), (3.0, 5.0, 1.0), (9.0, 10.0, 1.0)]
    assert share(spans, 1.0, 5.0) == pytest.approx((1.0 + 1.0) / 4.0)  # half of the second span was a stop
    assert share([], 1.0, 5.0) == 0.0


def test_made_up_captions_cover_their_tokens() -> None:
    old, new = Version(0, 1), Version(0, 2)
    assert [tuple(s.version for s in version_spans(old, v, 7)) for v in (old, new)] == [(old,), (old, new)]
    assert [(s.start, s.end) for s in version_spans(old, new, 7)] == [(0, 3), (3, 7)]


def test_overhead_is_all_but_the_threads_that_compute() -> None:
    before = {
        1: Used("python -m caprl_async.run conf=x", 10.0, {1: 9.0}),
        2: Used("ray::judge-0", 5.0, {20: 4.0, 21: 1.0}),
    }
    after = {
        1: Used("python -m caprl_async.run conf=x", 10.5, {1: 9.5}),
        2: Used("ray::judge-0: judging", 16.0, {20: 14.0, 21: 1.6, 22: 0.4}),
        3: Used("ray::learner-0: training 0.1", 8.0, {30: 1.0, 31: 6.5, 32: 0.3}),
        4: Used("ray::replay-queue", 1.0, {40: 1.0}),
        5: Used("raylet --flags", 0.5, {50: 0.5}),
    }
    parts = split(before, after)
    assert parts == pytest.approx(
        {
            **{"rollout": 0.0, "judge": 10.0, "learner": 7.5},
            **{"around rollout": 0.0, "around judge": 1.0, "around learner": 0.5},
            **{"queue": 1.0, "driver": 0.5, "ray": 0.5},
        }
    )
    assert overhead(parts) == pytest.approx(3.5 / 21.0)


@given(st.integers(1, 3_000_000))
def test_shapes_add_up_to_the_parameters(parameters: int) -> None:
    assert sum(math.prod(shape) for shape in bench_weights.shapes(parameters)) == parameters


def test_three_billion_parameters_look_like_such_a_model() -> None:
    found = bench_weights.shapes(3_000_000_000)
    assert 324 <= len(found) <= 350  # 36 layers of 9, and a little more
    assert max(map(math.prod, found)) * 2 < 2**30  # each fits a buffer


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(50, 120))
def test_chunks_are_consecutive_and_fit(sizes: list[int], capacity: int) -> None:
    found = bench_weights.chunks(sizes, capacity)
    assert [i for chunk in found for i in chunk] == list(range(len(sizes)))
    assert all(chunk and sum(sizes[i] for i in chunk) <= capacity for chunk in found)


def test_a_tensor_larger_than_the_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer of 10"):
        bench_weights.chunks([3, 11], 10)


def test_command_lines_that_measure_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_async.arguments(["--emulated"]).steps == 24
    assert bench_async.arguments([]).steps == 16
    for bad in (["--steps", "6"], ["--leave-out", "0"], ["--lags", "0"]):
        with pytest.raises(SystemExit):
            bench_async.arguments(bad)
    assert "--lags" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_travel_between_two_processes() -> None:
    figures = _last_line(
        "bench_weights.py", "--ipc-processes", "--parameters", "1e6", "--buffer-gib", "0.0005"
    )
    assert figures["bytes"] == 2e6
    assert figures["chunks"] > 2
    assert not figures["vllm"]
    assert figures["ratio"] == pytest.approx(figures["total"] / figures["copy"])


@pytest.mark.slow
def test_the_emulated_ring_turns() -> None:
    figures = _last_line("bench_async.py", "--emulated", "--smoke")
    assert set(figures["ways"]) == {"phases", "lag 0", "lag 2"}
    assert figures["bound"] == pytest.approx(2.0)
    assert figures["ratio"] > 1
    assert figures["ways"]["phases"]["staleness"] == figures["ways"]["lag 0"]["staleness"] == 0


def _last_line(*command: str) -> dict[str, object]:
    tool, *arguments = command
    done = subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    figures: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return figures
