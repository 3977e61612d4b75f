"""What an evaluation leaves in its run folder, written once and read by whoever compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from caprl_async.benchmarks.items import Item
from caprl_async.data.rows import DataError
from caprl_async.files import write_bytes
from caprl_async.prism.names import IMAGES, QUESTIONS, RESULT
from caprl_async.prism.told import Told

_T = TypeVar("_T")


class QuestionLine(msgspec.Struct, frozen=True):
    """One question; `told` is None where its image has no caption or nobody answered."""

    item: Item
    told: Told | None


class ImageLine(msgspec.Struct, frozen=True):
    """One image with its captions."""

    sha256: str
    path: str
    captions: Sequence[str]


@dataclass(frozen=True)
class Run:
    """One evaluation that is through."""

    name: str  # its folder's
    result: Mapping[str, Any]
    questions: Sequence[QuestionLine]
    images: Mapping[str, ImageLine]  # by SHA-256


def write_lines(path: Path, lines: Sequence[QuestionLine] | Sequence[ImageLine]) -> None:
    """Writes one of the .jsonl files, whole or not at all."""
    write_bytes(path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def read_run(folder: Path) -> Run:
    """
    Raises:
        DataError: it is no folder of an evaluation that is through.
    """
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / RESULT} is no result of job=evaluate: {error}") from error
    images = _lines(folder / IMAGES, ImageLine)
    return Run(
        name=folder.resolve().name,
        result=result,
        questions=_lines(folder / QUESTIONS, QuestionLine),
        images={line.sha256: line for line in images},
    )


def _lines(path: Path, kind: type[_T]) -> list[_T]:
    decoder = msgspec.json.Decoder(kind)
    found: list[_T] = []
    try:
        with path.open("rb") as lines:
            found.extend(map(decoder.decode, lines))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, line {len(found) + 1}: {error}") from error
    return found
