"""The result of a run: how many questions a captioner's captions answer, beside what it began with.

The job fills the rows; here they become the terminal's table, the report's table and `result.json`.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from caprl_async.observe.metrics import read_lines

TITLES = {
    "start": "supervised start",
    "forced": "start, made as long",
    "dense": "supervised, dense captions",
    "trained": "after training",
    "ceiling": "ground truth (ceiling)",
    "blind": "no caption (floor)",
}
"""Names of the rows, in the order in which they are shown."""

_ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One captioner measured on the held-out images; None where it was not measured."""

    name: str  # a key of TITLES
    judge: float | None = None  # accuracy of the judge that training uses, 0..1
    heldout_judge: float | None = None  # accuracy of a judge that training never meets, 0..1
    length: float | None = None  # mean tokens of a caption
    fact_precision: float | None = None  # share of the stated facts that are true, 0..1
    fact_recall: float | None = None  # share of the image's facts that are stated, 0..1

    @classmethod
    def of(cls, result: Mapping[str, Any], length: float | None = None) -> Row:
        """The row of one evaluation (`replay.evaluation.EvalResult`).

        `length` fills in where the captions are not sampled, and so have no tokens of the policy.
        """
        facts = result["facts"] or {}
        if result["length"] is not None:
            length = result["length"]
        return cls(
            name=result["name"],
            judge=_accuracy(result, "judge"),
            heldout_judge=_accuracy(result, "heldout"),
            length=0.0 if length is None and result["name"] == "blind" else length,
            fact_precision=facts.get("precision"),
            fact_recall=facts.get("recall"),
        )

    def flat(self) -> dict[str, float]:
        """What was measured, as metrics `eval_judge`, `eval_heldout_judge`, ..."""
        values = {f"eval_{name}": getattr(self, name) for name in _FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    def cells(self) -> tuple[str, str, str, str, str]:
        """judge, held-out judge, length, fact precision, fact recall, as a person reads them."""
        length = _ABSENT if self.length is None else f"{self.length:.1f}"
        return (
            _percent(self.judge),
            _percent(self.heldout_judge),
            length,
            _percent(self.fact_precision),
            _percent(self.fact_recall),
        )


_FIELDS = ("judge", "heldout_judge", "length", "fact_precision", "fact_recall")
HEADS = ("judge", "held-out judge", "tokens", "fact precision", "fact recall")


def _accuracy(result: Mapping[str, Any], judge: str) -> float | None:
    found = result["judges"].get(judge)
    known = found and found["n"] and not math.isnan(found["accuracy"])
    return found["accuracy"] if known else None  # of no answered question: not known, not 0


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f} %"


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The rows as they are shown; names that TITLES does not know come last."""
    order = list(TITLES)
    return sorted(rows, key=lambda r: order.index(r.name) if r.name in TITLES else len(order))


def gain_text(rows: Sequence[Row]) -> str:
    """What reinforcement learning gained over the start, in points; empty if either is missing."""
    by_name = {row.name: row for row in rows}
    start, trained = by_name.get("start"), by_name.get("trained")
    if start is None or trained is None:
        return ""
    parts = []
    for label, before, after in (
        ("judge", start.judge, trained.judge),
        ("held-out judge", start.heldout_judge, trained.heldout_judge),
    ):
        if before is not None and after is not None:
            parts.append(f"{100 * (after - before):+.1f} points by the {label}")
    return ", ".join(parts)


def rich_table(rows: Sequence[Row]) -> Table:
    """The table for the terminal."""
    table = Table(title="questions answered from the captions of held-out images", caption=gain_text(rows))
    table.add_column("captions from", no_wrap=True)
    for head in HEADS:
        table.add_column(head, justify="right")
    for row in in_order(rows):
        table.add_row(row.title, *row.cells(), style="bold" if row.name == "trained" else "")
    return table


def html_table(rows: Sequence[Row]) -> str:
    """The same as an HTML table; every cell is escaped."""
    heads = "".join(f'<th class="number">{html.escape(head)}</th>' for head in HEADS)
    lines = [f'<table class="result"><thead><tr><th>captions from</th>{heads}</tr></thead><tbody>']
    for row in in_order(rows):
        cells = "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in row.cells())
        name, title = html.escape(row.name), html.escape(row.title)
        lines.append(f'<tr class="row-{name}"><th scope="row">{title}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def result_json(
    rows: Sequence[Row], seconds: float, steps: int, staleness_mean: float, **more: Any
) -> dict[str, Any]:
    """The content of `result.json`: each row by name, and the run's own numbers.

    Accuracies 0..1, lengths in tokens; `more` (the overlap share, say) stands beside `seconds`.
    """
    values: dict[str, Any] = {}
    for row in in_order(rows):
        entry = {"judge": row.judge, "heldout_judge": row.heldout_judge, "length": row.length}
        for name in ("fact_precision", "fact_recall"):
            if getattr(row, name) is not None:
                entry[name] = getattr(row, name)
        values[row.name] = entry
    return {**values, "seconds": seconds, "steps": steps, "staleness_mean": staleness_mean, **more}


def write_result(path: Path, rows: Mapping[str, Row], **run: Any) -> None:
    """Writes `result.json`; `run` holds seconds, steps, staleness_mean and what else stands beside them."""
    text = json.dumps(result_json(list(rows.values()), **run), indent=2) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def print_table(rows: Mapping[str, Row], console: Console) -> None:
    """Prints the table to the terminal."""
    console.print(rich_table(list(rows.values())))


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """Inverse of `result_json` for the rows."""
    return [
        Row(name, **{field: entry.get(field) for field in _FIELDS})
        for name, entry in result.items()
        if isinstance(entry, Mapping)
    ]


def reference_length(evaluation: Path, model: str) -> float | None:
    """Mean tokens, with the end token, of the captions in an evals/*.jsonl file; None if it has none.

    Args:
        model: folder of the policy, whose tokenizer counts.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    captions = [line["caption"] for line in read_lines(evaluation) if line.get("caption")]
    lengths = [len(tokenizer(caption, add_special_tokens=False)["input_ids"]) + 1 for caption in captions]
    return sum(lengths) / len(lengths) if lengths else None
