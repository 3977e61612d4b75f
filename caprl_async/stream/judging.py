"""Rows through a judge: questions answered from captions, or from none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa

from caprl_async.config import JudgeConfig
from caprl_async.engine.types import EngineDied
from caprl_async.judge.judge import Judge
from caprl_async.stream.stage import ModelAway, Row, end_process
from caprl_async.types import Outcome, Question, Verdict

JUDGED = pa.schema(
    [
        ("id", pa.string()),
        ("problem", pa.string()),
        ("scores", pa.list_(pa.list_(pa.float64()))),
        ("abstained", pa.list_(pa.list_(pa.float64()))),
        ("chosen", pa.list_(pa.list_(pa.string()))),
    ]
)
"""Of a row's verdicts [caption][question]: `score`, `abstained` and `choice`; null where there is none."""

_QUESTIONS = msgspec.json.Decoder(tuple[Question, ...])


def judged_row(row_id: str, captions: Sequence[str], questions: Sequence[Question]) -> Row:
    """What the stage takes."""
    asked = questions_text(questions)
    return {"id": row_id, "problem": None, "captions": list(captions), "questions": asked}


def questions_text(questions: Sequence[Question]) -> str:
    """Questions as a column holds them."""
    return msgspec.json.encode(questions).decode()


def questions_of(row: Row) -> tuple[Question, ...]:
    """Inverse of `questions_text`, of a row's column `questions`."""
    return _QUESTIONS.decode(row["questions"])


class JudgeStage:
    """One judge. Questions that it finds unscorable have no score; a row without an answer is a problem."""

    def __init__(self, config: JudgeConfig, seed: int) -> None:
        self._judge = Judge.load(config, seed)
        self._away = 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = batch.to_pylist()
        try:
            every = await asyncio.gather(
                *(self._judge.judge(row["captions"], questions_of(row)) for row in rows)
            )
        except EngineDied as error:
            end_process("judge", error)
        for row, verdicts in zip(rows, every, strict=True):
            self._judged(row, verdicts)
        return pa.Table.from_pylist(rows, schema=JUDGED)

    def _judged(self, row: Row, verdicts: Sequence[Sequence[Verdict]]) -> None:
        """
        Raises:
            ModelAway: the judge has answered nothing of many rows, one after the other.
        """
        flat = [verdict for one in verdicts for verdict in one]
        down = [verdict for verdict in flat if verdict.outcome is Outcome.JUDGE_DOWN]
        self._away = self._away + 1 if flat and len(down) == len(flat) else 0
        if self._away > 200:
            raise ModelAway(f"judge has not answered {self._away} rows in a row: {down[0].reason}")
        if down:
            row["problem"] = f"the judge did not answer: {down[0].reason}"
        row["scores"] = [[verdict.score for verdict in one] for one in verdicts]
        row["abstained"] = [[verdict.abstained for verdict in one] for one in verdicts]
        row["chosen"] = [[verdict.choice for verdict in one] for one in verdicts]
