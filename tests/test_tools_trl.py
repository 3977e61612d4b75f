"""The pure parts of the comparison with TRL, which is not installed for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.append(str(TOOLS))

from bench_trl import (  # noqa: E402
    ONE_PASS,
    OURS,
    PLAIN,
    WAYS,
    Way,
    at_lag_0,
    best,
    main,
    markdown,
    our_figures,
    reason,
    trl_figures,
)
from trl_engines import caption_length  # noqa: E402
from trl_side import grpo_arguments, load_config, one_placeholder, reason_of  # noqa: E402

FIGURES = dict.fromkeys(
    (
        *("captions_per_s", "spread_per_s", "step_s", "generation_s", "reward_s", "training_s"),
        *("tokens_per_caption", "reward"),
    ),
    1.0,
)


def record(step: int) -> dict[str, float]:
    """Running totals of 128 captions a step, 10 s each, of which the first takes 100."""
    return {
        "time": 90.0 + 10.0 * step,
        "generation": 4.0 * step,
        "reward": 3.0 * step,
        "captions": 128.0 * step,
        "tokens": 1280.0 * step,
        "without_spread": 32.0 * step,
        "reward_sum": 64.0 * step,
    }


def test_figures_of_trl_leave_out_the_first_steps() -> None:
    figures = trl_figures([record(step) for step in range(1, 9)], warm=4)
    assert figures["captions_per_s"] == pytest.approx(12.8)
    assert figures["spread_per_s"] == pytest.approx(9.6)
    assert figures["tokens_per_caption"] == pytest.approx(10.0)
    assert figures["reward"] == pytest.approx(0.5)
    stages = [figures[f"{stage}_s"] for stage in ("generation", "reward", "training")]
    assert stages == pytest.approx([4.0, 3.0, 3.0])
    assert sum(stages) == pytest.approx(figures["step_s"])


def test_figures_of_trl_with_one_generation_for_several_updates() -> None:
    records = [{**record(4 * ((step + 3) // 4)), "time": 10.0 * step} for step in range(1, 9)]
    figures = trl_figures(records, warm=4)
    assert figures["captions_per_s"] == pytest.approx(12.8)
    assert figures["generation_s"] == pytest.approx(4.0)


def test_figures_of_ours() -> None:
    rows = [
        {
            "time": 100.0 + 2.0 * step,
            "captions_trained": 128.0 * step,
            "caption_length_mean": 9.0,
            "reward_all_mean": None if step == 6 else 0.5,
            "idle_rollout": 0.25,
            "idle_judge": 0.5,
            "learner_step_s": 1.5,
        }
        for step in range(1, 9)
    ]
    figures = our_figures(rows, warm=4)
    assert figures["captions_per_s"] == figures["spread_per_s"] == pytest.approx(64.0)
    assert figures["step_s"] == pytest.approx(2.0)
    assert figures["generation_s"] == pytest.approx(1.5)
    assert figures["reward_s"] == pytest.approx(1.0)
    assert figures["reward"] == pytest.approx(0.5)


def test_a_longer_generation_lengthens_the_synchronous_step() -> None:
    figures = {"captions_per_s": 64.0, "step_s": 2.0}
    assert at_lag_0(figures, 2.0) == pytest.approx(32.0)
    assert at_lag_0(figures, 0.0) == pytest.approx(64.0)


def test_the_fastest_that_learns_alike_is_chosen() -> None:
    ways = [Way("slow"), Way("fast"), Way("other precision", eligible=False), Way("failed")]
    speeds = {"slow": 1.0, "fast": 2.0, "other precision": 3.0}
    found = {name: {"spread_per_s": speed} for name, speed in speeds.items()}
    assert best(found, ways).name == "fast"
    with pytest.raises(SystemExit, match="no configuration"):
        best({}, ways)


def test_ways_differ_and_keep_the_batch() -> None:
    assert len({way.name for way in WAYS}) == len(WAYS)
    config = load_config({"overrides": PLAIN})
    for way in WAYS:
        arguments = grpo_arguments(config, 2, way.trl, "folder")
        per_update = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        assert per_update == config.replay.batch_groups * config.rollout.group_size == 128
        assert arguments["learning_rate"] == config.learner.lr


def test_the_environment_of_a_way() -> None:
    assert Way("a", threads=1).env() == {"OMP_NUM_THREADS": "1"}
    assert Way("b", ONE_PASS).env()["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in Way("c", ONE_PASS, shims=False).env()
    spec = Way("d", ONE_PASS, judge_threads=2).spec(8, ["seed=1"])
    assert (spec["steps"], spec["judge_threads"], spec["overrides"]) == (8, 2, ["seed=1"])


def test_reasons() -> None:
    log = "starting\nValueError: not\n[rank0]: AttributeError: no weight_loader\nW1126 a warning\n"
    assert reason(log) == "AttributeError: no weight_loader"
    assert reason("killed\n\n") == "killed"
    assert reason("") == "no output"

    def broken() -> None:
        raise ValueError("not this\nand more")

    assert reason_of(broken) == "ValueError: not this"
    with pytest.raises(SystemExit, match="time it"):
        reason_of(lambda: None)


def test_placeholders_and_lengths() -> None:
    assert one_placeholder([3, 6, 6, 6, 4, 6, 6, 5, 5], 6) == [3, 6, 4, 6, 5, 5]
    assert one_placeholder([6, 6], 6) == [6]
    assert one_placeholder([], 6) == []
    assert caption_length([8, 9, 2, 0, 0], 2) == 3
    assert caption_length([8, 9], 2) == 2


def test_markdown() -> None:
    lines = markdown(dict.fromkeys(OURS, FIGURES)).splitlines()
    assert len(lines) == 2 + len(OURS)
    assert len({line.count("|") for line in lines}) == 1


def test_without_trl_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_trl"])
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[bench\]'"):
        main()
