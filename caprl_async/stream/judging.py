"""Rows through a judge: questions answered from captions, or from none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
import pyarrow as pa

from caprl_async.config import JudgeConfig
from caprl_async.engine.types import EngineDied
from caprl_async.judge.judge import Judge
from caprl_async.judge.permutations import rotation_of
from caprl_async.stream.stage import ModelAway, Row, end_process, on_actors
from caprl_async.stream.texts import asked_as
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

_BATCH = 16  # rows, each with all captions and questions of an image
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


def about_judge(config: JudgeConfig) -> dict[str, Any]:
    """What a judge's verdicts depend on beside captions and questions."""
    return {
        "judge": " ".join(filter(None, (config.endpoint.url, config.endpoint.model))) or config.model,
        "mode": config.mode.value,
        "permutations": config.permutations,
        "temperature": config.temperature,
        "prompt": asdict(config.prompt),
    }


def judging(config: JudgeConfig, seed: int, gpus: float) -> Callable[[Any], Any]:
    """Makes of a ray.data.Dataset of `judged_row` the one behind a `JudgeStage`, with JUDGED's columns."""
    return lambda rows: on_actors(rows, JudgeStage, (config, seed), _BATCH, config.num_actors, gpus)


def judged_as(row: Row) -> Row:
    """A row of `judged_row`, with an id by what is asked; see `asked_as`."""
    return {**row, "id": asked_as(row["id"], row["captions"], row["questions"])}


class JudgeStage:
    """One judge. Questions that it finds unscorable have no score; a row without any score is a problem: a
    server that refuses everything (an account without money) must not pass for a judge.
    """

    def __init__(self, config: JudgeConfig, seed: int) -> None:
        self._judge = Judge.load(config, seed)
        self._away = 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = batch.to_pylist()
        try:
            every = await asyncio.gather(*map(self._verdicts, rows))
        except EngineDied as error:
            end_process("judge", error)
        for row, verdicts in zip(rows, every, strict=True):
            self._judged(row, verdicts)
        return pa.Table.from_pylist(rows, schema=JUDGED)

    async def _verdicts(self, row: Row) -> Sequence[Sequence[Verdict]]:
        questions = questions_of(row)
        return await self._judge.judge(row["captions"], questions, rotation_of(questions))

    def _judged(self, row: Row, verdicts: Sequence[Sequence[Verdict]]) -> None:
        """
        Raises:
            ModelAway: the judge has answered nothing of many rows, one after the other.
        """
        flat = [verdict for one in verdicts for verdict in one]
        down = [verdict for verdict in flat if verdict.outcome is Outcome.JUDGE_DOWN]
        if flat and not any(verdict.outcome is Outcome.SCORED for verdict in flat):
            down = down or flat
            self._away += 1
        else:
            self._away = 0
        if self._away > 200:
            raise ModelAway(f"judge has not answered {self._away} rows in a row: {down[0].reason}")
        if down:
            row["problem"] = f"the judge did not answer: {down[0].reason}"
        row["scores"] = [[verdict.score for verdict in one] for one in verdicts]
        row["abstained"] = [[verdict.abstained for verdict in one] for one in verdicts]
        row["chosen"] = [[verdict.choice for verdict in one] for one in verdicts]
