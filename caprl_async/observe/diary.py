"""What the ring said of itself, with times: who was started, died, came back, joined, left."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from caprl_async.observe.metrics import read_lines

DIARY = "diary.jsonl"


def note(run_dir: Path, text: str) -> None:
    """Appends one entry; where that fails, the text is on the terminal all the same."""
    entry = json.dumps({"time": round(time.time(), 3), "text": text})
    with contextlib.suppress(OSError), (run_dir / DIARY).open("a", encoding="utf-8") as file:
        file.write(entry + "\n")


def read_diary(run_dir: Path) -> Sequence[tuple[float, str]]:
    """(seconds since 1970, text) of each entry, oldest first."""
    return [
        (float(line["time"]), str(line.get("text", "")))
        for line in read_lines(run_dir / DIARY)
        if isinstance(line.get("time"), int | float)
    ]
