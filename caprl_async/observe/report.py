"""Makes `report.html`, one file that shows a whole run: curves, result, captions before and after, conf.

Reads only the run folder, so it can be made again at any time, also for a run that stopped early. All text
from the run is escaped by the template; nothing is fetched from a network.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from caprl_async.observe import bad_input, table
from caprl_async.observe.alarms import read_alarms
from caprl_async.observe.charts import HACKING_CHARTS, Drawn, draw_all
from caprl_async.observe.diary import read_diary
from caprl_async.observe.drawings import gantt, latencies, staleness
from caprl_async.observe.environment import read_environment
from caprl_async.observe.metrics import read_lines, read_metrics
from caprl_async.observe.monitors import monitor_rows
from caprl_async.observe.pages import data_uri, template, write_page
from caprl_async.observe.progress import duration
from caprl_async.observe.schedule import Schedule, schedule
from caprl_async.replay.ledger import read_rows

REPORT = "report.html"
LEDGER = "ledger.sqlite"
_TEMPLATE = Path(__file__).with_name("report.html")
_SAMPLES = 6  # training groups shown
_CAPTIONS = 4  # captions shown of each
_ALARMS = 40  # shown, the last ones
_DIARY = 100  # the same
_JUDGES = {"judge": "the judge of the training", "heldout": "the held-out judge"}


def write_report(run_dir: Path | str, *, going_on: bool = False) -> Path:
    """Writes `run_dir/report.html` from what the run folder holds; returns its path.

    The page of a run that is `going_on` loads itself again every 20 seconds.
    """
    folder = Path(run_dir)
    return write_page(folder / REPORT, render(folder, going_on=going_on))


def render(folder: Path, *, going_on: bool = False) -> str:
    """The whole page."""
    conf_text = _read_text(folder / "conf.yaml")
    conf = _mapping(conf_text)
    result = _read_json(folder / "result.json")
    rows = read_metrics(folder)
    results = table.rows_of(result)
    done = _schedule(folder)
    bands = _at(conf, "observe", "bands", {})
    return template(_TEMPLATE).render(
        name=folder.resolve().name,
        supervised=_supervised(conf),
        facts=_facts(folder, conf, result, rows),
        finished=bool(result),
        going_on=going_on,
        gain=table.gain_text(results),
        result_table=Markup(table.html_table(results)) if results else "",
        charts=_marked(draw_all(rows)),
        hacking_charts=_marked(draw_all(rows, HACKING_CHARTS)),
        gantt=Markup(gantt(done)),
        spreads=_marked([*filter(None, [staleness(rows)]), *latencies(done)]),
        diary=[(_clock(moment), text) for moment, text in read_diary(folder)[-_DIARY:]],
        restarts=_restarts(rows),
        environment=read_environment(folder),
        monitors=monitor_rows(rows, bands if isinstance(bands, dict) else {}),
        alarms=read_alarms(folder)[-_ALARMS:],
        rejects=bad_input.kinds(folder),
        counts=bad_input.counts(rows),
        gallery=gallery(folder, int(_at(conf, "observe", "gallery_images", 12))),
        samples=training_samples(folder),
        conf=conf_text,
    )


def _schedule(folder: Path) -> Schedule:
    """Of the ledger, which the run may be writing; empty if there is none that can be read."""
    try:
        return schedule(read_rows(folder / LEDGER))
    except (FileNotFoundError, sqlite3.Error):
        return schedule([])


def _restarts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(role, how often one of its actors was started again)."""
    last = rows[-1] if rows else {}
    head = "restarts_"
    return [(name.removeprefix(head), int(n)) for name, n in last.items() if name.startswith(head) and n]


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _marked(charts: Sequence[Drawn]) -> list[tuple[Drawn, Markup]]:
    """Each chart with its SVG, which is ours and needs no escaping."""
    return [(chart, Markup(chart.svg)) for chart in charts]


# ---------------------------------------------------------------- header


def _facts(
    folder: Path, conf: Mapping[str, Any], result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """(label, value) lines of the header."""
    done = int(rows[-1]["step"]) if rows else 0
    data = ("sft", "data") if _supervised(conf) else ("data", "train")
    judged = not _supervised(conf) or bool(_at(conf, "data", "heldout", ""))
    facts = [
        ("captioner", str(_at(conf, "policy", "model", "not recorded"))),
        *([("judge", _judge_name(conf))] if judged else []),
        ("training data", str(_at(conf, *data, "not recorded"))),
        ("steps", f"{done} of {conf.get('steps', '?')}"),
        ("seed", str(conf.get("seed", "?"))),
    ]
    if isinstance(seconds := result.get("seconds"), int | float):
        facts.append(("took", duration(seconds)))
    if isinstance(staleness := result.get("staleness_mean"), int | float):
        facts.append(("mean staleness", f"{staleness:.2f} steps"))
    if isinstance(overlap := result.get("overlap"), int | float):
        facts.append(
            ("overlap", f"{overlap:.0%} of the learner steps ran while later batches were generated")
        )
    return [
        *facts,
        ("run folder", str(folder.resolve())),
        ("report made", _clock(time.time())),
    ]


def _supervised(conf: Mapping[str, Any]) -> bool:
    return conf.get("job") == "sft"


def _judge_name(conf: Mapping[str, Any]) -> str:
    endpoint = _at(conf, "judge", "endpoint", {})
    served = f"{endpoint.get('model') or 'the model'} at {endpoint['url']}" if endpoint.get("url") else ""
    return served or str(_at(conf, "judge", "model", "not recorded"))


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True)
class Asked:
    """One question of the gallery with each policy's answer."""

    stem: str
    answer: str
    kind: str
    before: tuple[str, str]  # (right | wrong | missing, what the judge chose)
    after: tuple[str, str]


@dataclass(frozen=True)
class Shown:
    """One held-out image of the gallery."""

    row_id: str
    image: str  # data URI; empty if the image cannot be read
    before: Mapping[str, Any]
    after: Mapping[str, Any] | None
    judges: tuple[tuple[str, tuple[Asked, ...]], ...]  # (judge, its questions)


def gallery(folder: Path, limit: int) -> list[Shown]:
    """The first `limit` held-out images, in the order of the evaluation of the start: not picked."""
    start = read_lines(folder / "evals" / "start.jsonl")
    trained = {line.get("row_id"): line for line in read_lines(folder / "evals" / "trained.jsonl")}
    return [_shown(line, trained.get(line.get("row_id"))) for line in start[:limit]]


def _shown(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Shown:
    judges = []
    for judge, questions in before.get("questions", {}).items():
        later = {q["question_id"]: q for q in (after or {}).get("questions", {}).get(judge, ())}
        asked = tuple(
            Asked(
                stem=str(q["stem"]),
                answer=str(q["answer"]),
                kind=str(q.get("kind", "")),
                before=_answered(q),
                after=_answered(later.get(q["question_id"])),
            )
            for q in questions
        )
        judges.append((_JUDGES.get(judge, judge), asked))
    return Shown(
        row_id=str(before.get("row_id", "")),
        image=data_uri(Path(str(before.get("image", "")))),
        before=before,
        after=after,
        judges=tuple(judges),
    )


def _answered(question: Mapping[str, Any] | None) -> tuple[str, str]:
    if question is None:
        return "missing", ""
    if question.get("outcome", "scored") != "scored" or question.get("choice") is None:
        return "missing", str(question.get("outcome", "no answer"))
    right = question["choice"] == question["answer"]
    return ("right" if right else "wrong"), str(question["choice"])


# ---------------------------------------------------------------- training samples


def training_samples(folder: Path) -> list[dict[str, Any]]:
    """A few training groups, spread evenly from the first step to the last; best captions first."""
    lines = read_lines(folder / "samples.jsonl")
    if len(lines) > _SAMPLES:
        lines = [lines[round(i * (len(lines) - 1) / (_SAMPLES - 1))] for i in range(_SAMPLES)]
    return [_sample(line) for line in lines]


def _sample(line: Mapping[str, Any]) -> dict[str, Any]:
    captions = list(enumerate(line.get("captions", ())))
    captions.sort(key=lambda c: _or_lowest(c[1].get("reward")), reverse=True)
    if len(captions) > _CAPTIONS:  # the best and the worst tell most
        captions = captions[: _CAPTIONS // 2] + captions[-_CAPTIONS // 2 :]
    order = [number for number, _ in captions]
    return {
        "step": line.get("step"),
        "row_id": line.get("row_id", ""),
        "image": data_uri(Path(str(line.get("image", "")))),
        "captions": [caption for _, caption in captions],
        "questions": [_sample_question(q, order) for q in line.get("questions", ())],
    }


def _sample_question(question: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """`scores` and `choice` of a question are per caption; they are put into the captions' new order."""
    answer, choices = question.get("answer"), question.get("choices", ())
    if isinstance(answer, int) and answer < len(choices):
        answer = choices[answer]
    scores = question.get("scores") or ()
    chosen = question.get("choice") or ()
    cells = [
        (
            scores[i] if i < len(scores) else None,
            chosen[i] if isinstance(chosen, list) and i < len(chosen) else None,
        )
        for i in order
    ]
    return {"stem": question.get("stem", ""), "answer": answer, "cells": cells}


def _or_lowest(value: float | None) -> float:
    return float("-inf") if value is None else value


# ---------------------------------------------------------------- reading what may be missing


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path) or "{}")
    except ValueError:
        return {}  # half a file of a run that was killed: the page says that there is no result
    return value if isinstance(value, dict) else {}


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}  # as of half a result.json; the page shows the text as it is
    return value if isinstance(value, dict) else {}


def _at(conf: Mapping[str, Any], room: str, name: str, default: Any) -> Any:
    inner = conf.get(room)
    value = inner.get(name) if isinstance(inner, dict) else None
    return default if value is None or value == "" else value
