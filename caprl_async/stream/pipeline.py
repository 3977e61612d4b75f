"""One pass of rows through a model into an output: what every job that streams is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from caprl_async.observe.counting import Counting
from caprl_async.stream.done import Done
from caprl_async.stream.shards import Shards
from caprl_async.stream.stage import explained

FAILURES = "failures.jsonl"
"""Name of the file of rows that failed."""


@dataclass
class Passed:
    """What a pass came to."""

    before: int  # rows that the output had already
    made: int = 0
    failed: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    rows_per_s: float = 0.0


def run_pass(
    rows: Any,
    total: int | None,
    stage: Callable[[Any], Any],
    shards: Shards,
    failures: Path,
    console: Console,
    *,
    what: str,
) -> Passed:
    """Rows (a ray.data.Dataset with `id` and `problem`) that `shards` lacks, through a stage, into it.

    `total` is their number, None if it is not known; `stage` makes of a data set the one behind the stage. A
    row that fails is a line of `failures` with its reason, and no more: the next pass tries it again.

    Raises:
        ConfError, RingFailed: see `stage.explained`. What was made until then is in the output.
    """
    with explained():
        done = Done(shards.ids())
    passed = Passed(before=len(done))
    if len(done):
        console.print(f"{what}: {len(done)} are done already", markup=False)
        rows = rows.map_batches(_without, fn_args=(done,), batch_format="pyarrow")
    asked = stage(rows)
    left = None if total is None else max(0, total - len(done))
    with Counting(what, left, console) as counting, failures.open("w", encoding="utf-8") as lost:
        try:
            with explained():
                for batch in asked.iter_batches(batch_size=None, batch_format="pyarrow"):
                    for row in batch.to_pylist():
                        _take_in(row, shards, passed, lost)
                    counting.count(len(batch), passed.failed)
                    lost.flush()
        finally:
            shards.flush()
            passed.rows_per_s = counting.per_second()
    return passed


def _take_in(row: dict[str, Any], shards: Shards, passed: Passed, lost: Any) -> None:
    problem = row.pop("problem") or shards.refusal(row)
    if problem:
        told = {"id": row["id"], "path": row.get("path"), "problem": problem}
        lost.write(json.dumps(told, ensure_ascii=False) + "\n")
        passed.failed += 1
        passed.problems[problem] += 1
    else:
        shards.add(row)
        passed.made += 1


def _without(table: pa.Table, done: Done) -> pa.Table:
    """The rows that are not done."""
    return table.filter(pa.array(~done.has(table["id"].to_pylist())))
