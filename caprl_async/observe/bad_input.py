"""What a run was given and could not use: rejects of the data, messages, prompts given up; for the report.

Everything in `rejects.jsonl` comes from the data, so nothing in it is trusted: the template escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprl_async.data.rows import REJECTS

COUNTS = {
    "messages_dropped": "messages to the hub that could not be decoded",
    "messages_unexpected": "messages out of turn, as of a peer before its Hello",
    "messages_refused": "connections of strangers to the hub",
    "evicted_bad_row": "prompts given up: the image could not be read",
    "evicted_failed": "prompts given up: captions or verdicts failed too often",
    "evicted_unscorable": "prompts given up: too few captions had verdicts",
    "retried_failed": "prompts issued again after a failure",
}
"""Metrics that count since the hub was started, in words; evictions of good rows are no bad input."""

_EXAMPLES = 3  # of each kind
_SHOWN = 160  # characters of an example


@dataclass
class Kind:
    """All rejects with one reason."""

    reason: str
    count: int = 0
    columns: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


def kinds(run_dir: Path) -> list[Kind]:
    """The rejected rows and questions by reason, the most frequent first; read line by line."""
    found: dict[str, Kind] = {}
    path = run_dir / REJECTS
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            reject = _reject(line)
            if reject is None:
                continue
            reason = str(reject.get("reason", "?"))[:_SHOWN]
            kind = found.setdefault(reason, Kind(reason))
            kind.count += 1
            column = str(reject.get("column") or "")[:_SHOWN]
            if column and column not in kind.columns:
                kind.columns.append(column)
            if len(kind.examples) < _EXAMPLES:
                kind.examples.append(_example(reject))
    return sorted(found.values(), key=lambda kind: -kind.count)


def _reject(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None  # the writer died in the middle of this line
    return value if isinstance(value, dict) else None


def _example(reject: Mapping[str, Any]) -> str:
    question = reject.get("question")
    row = str(reject.get("row_id", "?"))[:_SHOWN]
    where = row if question is None else f"{row}, question {question}"
    return f"{where}: {reject['detail']}"[:_SHOWN] if reject.get("detail") else where


def counts(rows: Sequence[Mapping[str, float | None]]) -> list[tuple[str, int]]:
    """What the last step's metrics count of bad input, in words."""
    last = rows[-1] if rows else {}
    values = {name: last.get(name) for name in COUNTS}
    known = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return [(text, int(known[name])) for name, text in COUNTS.items() if name in known]
