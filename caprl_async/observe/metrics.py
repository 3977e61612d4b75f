"""One flat dict of numbers per learner step, kept as `metrics.jsonl` and as TensorBoard events.

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

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from caprl_async.observe.names import METRICS

TENSORBOARD = "tensorboard"

Row = dict[str, float | None]


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`, one flushed line per step, and to `run_dir/tensorboard`.

    After a resume, or a rollback, steps are simply written again: `read_metrics` and TensorBoard take the
    last word on each step.
    """

    def __init__(self, run_dir: Path | str) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _end_last_line(folder / METRICS)
        self._lines = (folder / METRICS).open("a", encoding="utf-8")
        self._events = EventFileWriter(str(folder / TENSORBOARD), flush_secs=10)
        self._last: int | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps the metrics of one step. What is no finite number becomes null, and no TensorBoard point."""
        now = time.time()
        row: Row = {name: _finite(value) for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": step, "time": now, **row}, allow_nan=False) + "\n")
        self._lines.flush()
        if self._last is None or step <= self._last:
            self._forget_from(step, now)
        self._last = step
        points = [
            summary_pb2.Summary.Value(tag=f"caprl/{name}", simple_value=value)
            for name, value in row.items()
            if value is not None
        ]
        event = event_pb2.Event(wall_time=now, step=step, summary=summary_pb2.Summary(value=points))
        self._events.add_event(event)

    def _forget_from(self, step: int, now: float) -> None:
        """Tells TensorBoard that points at `step` and after it, from an earlier life, are void."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add_event(event_pb2.Event(wall_time=now, step=step, session_log=start))

    def close(self) -> None:
        self._lines.close()
        self._events.close()

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
