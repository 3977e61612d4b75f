"""Rows that ask one model several texts each: questions to an answerer, answers to a grader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from caprl_async.stream.sources import table_of
from caprl_async.stream.stage import Row
from caprl_async.writer.types import Ask, Text

ASKED = pa.schema([("id", pa.string()), ("problem", pa.string()), ("prompts", pa.list_(pa.string()))])
ANSWERED = pa.schema([("id", pa.string()), ("problem", pa.string()), ("answers", pa.list_(pa.string()))])


def asked_as(row_id: str, *asked: Any) -> str:
    """The id of a row in an output: the row's own, and a digest of what is asked (JSON). So what was answered
    before is an answer to the same question, whatever a conf, a file or a captioner has become since."""
    told = json.dumps(asked, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return f"{row_id} {hashlib.blake2b(told, digest_size=16).hexdigest()}"


def rows_of(prompts: Mapping[str, Sequence[str]]) -> Any:
    """A ray.data.Dataset of ASKED rows, from id -> its texts."""
    rows = [{"id": row_id, "prompts": list(texts)} for row_id, texts in prompts.items()]
    return table_of(rows, ASKED)


@dataclass(frozen=True)
class Texts:
    """Each of a row's texts is one ask."""

    seed: int | None = None

    def asks(self, row: Row) -> Sequence[Ask]:
        return [Ask(prompt, seed=self.seed) for prompt in row["prompts"]]

    def take(self, row: Row, answers: Sequence[tuple[Text, ...]]) -> Row:
        return {"answers": [one.text for (one,) in answers]}
