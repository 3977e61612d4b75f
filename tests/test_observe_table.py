"""The result table, for the terminal, the page and result.json."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from caprl_async import conf
from caprl_async.observe import table
from caprl_async.observe.table import Row

ROWS = {
    "trained": Row("trained", 0.71, 0.66, 17.4, 0.62, 0.70),
    "start": Row("start", 0.372, 0.35, 7.4, 0.61, 0.30),
    "blind": Row("blind", 0.25, 0.25, 0.0),
    "ceiling": Row("ceiling", 0.98, 0.97, 24.0, 1.0, 1.0),
    "forced": Row("forced", 0.4, 0.41, 17.4, 0.3, 0.35),
}


def test_rows_are_printed_in_order_with_the_gain() -> None:
    out = io.StringIO()
    table.print_table(ROWS, Console(file=out, width=140))
    text = out.getvalue()
    order = [text.index(table.TITLES[n]) for n in ("start", "forced", "trained", "ceiling", "blind")]
    assert order == sorted(order)
    assert "37.2 %" in text
    assert "+33.8 points by the judge, +31.0 points by the held-out judge" in " ".join(text.split())


def test_result_json_has_the_promised_shape(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    table.write_result(path, ROWS, seconds=512.5, steps=60, staleness_mean=1.2, overlap=0.95)
    result = json.loads(path.read_text())
    assert {"start", "trained", "ceiling", "blind", "seconds", "steps", "staleness_mean"} <= set(result)
    assert result["blind"] == {"judge": 0.25, "heldout_judge": 0.25, "length": 0.0}
    assert result["trained"]["fact_precision"] == 0.62
    assert (result["seconds"], result["steps"], result["overlap"]) == (512.5, 60, 0.95)
    assert table.rows_of(result) == table.in_order(list(ROWS.values()))


def test_what_was_not_measured_is_a_dash_and_null() -> None:
    row = Row("start", judge=0.5)
    assert row.cells() == ("50.0 %", "–", "–", "–", "–")
    assert table.result_json([row], 1.0, 2, 0.0)["start"] == {
        "judge": 0.5,
        "heldout_judge": None,
        "length": None,
    }
    assert table.gain_text([row]) == ""
    assert "<script>" not in table.html_table([Row("<script>")])


def test_a_row_is_made_of_an_evaluation() -> None:
    result: dict[str, Any] = {
        "name": "trained",
        "judges": {"judge": {"accuracy": 0.7, "n": 100}, "heldout": {"accuracy": 0.0, "n": 0}},
        "length": 17.5,
        "facts": {"precision": 0.6, "recall": 0.7},
    }
    row = Row.of(result)
    assert row == Row("trained", 0.7, None, 17.5, 0.6, 0.7)  # no question scored: not known, not 0
    assert row.flat() == {
        "eval_judge": 0.7,
        "eval_length": 17.5,
        "eval_fact_precision": 0.6,
        "eval_fact_recall": 0.7,
    }
    unsampled = {**result, "length": None, "facts": None}
    assert Row.of({**unsampled, "name": "ceiling"}, length=20.0).length == 20.0
    assert Row.of({**unsampled, "name": "blind"}).length == 0.0


def test_reference_captions_are_counted_with_the_policys_tokens(tmp_path: Path) -> None:
    model = conf.resolve_path("pkg:tiny/models/policy")
    path = tmp_path / "ceiling.jsonl"
    path.write_text(
        json.dumps({"caption": "topleft red circle ."}) + "\n" + json.dumps({"caption": None}) + "\n"
    )
    assert table.reference_length(path, model) == 5.0
    assert table.reference_length(tmp_path / "missing.jsonl", model) is None
