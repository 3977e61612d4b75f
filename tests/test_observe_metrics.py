"""metrics.jsonl holds what was measured, also after a crash and a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

from caprl_async.observe.metrics import MetricsWriter, read_metrics
from caprl_async.observe.names import METRICS


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward_mean": 0.5, "kl": math.nan, "ratio_max": math.inf})
        (line,) = (tmp_path / METRICS).read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: AssertionError(name))
    assert (row["step"], row["reward_mean"], row["kl"], row["ratio_max"]) == (1, 0.5, None, None)


def test_after_a_resume_the_last_word_on_a_step_counts(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"reward_mean": 0.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "rewa')  # killed while writing
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"reward_mean": 1.0})
        writer.write(4, {"reward_mean": 1.0})
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["reward_mean"]) for row in rows] == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)]


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
