"""One flat dict of numbers per learner step, kept as `metrics.jsonl`.

Written by the driver, read by report.py and by whoever plots.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from caprl_async.observe.names import METRICS

Row = dict[str, float | None]


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`, one flushed line per step.

    After a resume, or a rollback, steps are simply written again: `read_metrics` takes the last word on each.
    """

    def __init__(self, run_dir: Path | str) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _end_last_line(folder / METRICS)
        self._lines = (folder / METRICS).open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps the metrics of one step. What is no finite number becomes null."""
        row: Row = {name: _finite(value) for name, value in metrics.items()}
        line = {"step": step, "time": time.time(), **row}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[Row]:
    """The rows of a run in the order of their steps; of a step written twice, the later row.

    A run that was killed may end in half a line: it is left out.
    """
    return _last_of_each_step(read_lines(Path(run_dir) / METRICS))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; a missing file has none, and a torn line is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    ):  # not at Unicode's line breaks
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the writer died in the middle of this line
        if isinstance(value, dict):
            found.append(value)
    return found


def _last_of_each_step(rows: list[dict[str, Any]]) -> list[Row]:
    kept: dict[float, Row] = {row["step"]: row for row in rows if isinstance(row.get("step"), int | float)}
    return [kept[step] for step in sorted(kept)]


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _end_last_line(path: Path) -> None:
    """A run that was killed may have left half a line; the next row must not be glued to it."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
