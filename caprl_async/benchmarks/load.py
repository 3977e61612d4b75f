"""The one door to benchmark files: `load_items` reads them and hands out items that can be scored."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from caprl_async.benchmarks.items import BadGold, Item
from caprl_async.benchmarks.records import Record
from caprl_async.benchmarks.scorers import check
from caprl_async.benchmarks.table import BENCHMARKS, IDS, Benchmark, prompted
from caprl_async.data.caprl_qa import image_source
from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.parquet import parquet_records
from caprl_async.data.questions import literal
from caprl_async.data.rows import BadQuestion, BadRow, DataError, Reject, id_of, is_given, place
from caprl_async.types import ImageRef

_SUFFIXES = (".tsv", ".parquet", ".json")
_CHUNK = 256  # rows of a TSV file in memory
_REFERENCE = 64  # characters; a shorter image cell of a TSV file names the row that has the image


@dataclass(frozen=True)
class Benchmarked:
    """What a file asks; `rejects` is what cannot be asked or scored."""

    items: tuple[Item, ...]
    rejects: tuple[Reject, ...]


def load_items(name: str, path: Path, store: ImageStore) -> Benchmarked:
    """The items of a .tsv, .parquet or .json file or of a folder of those; images go into `store`.

    Raises:
        DataError: the benchmark is not known, or the file is missing, damaged or has no usable row.
    """
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        raise DataError(f"{name!r} is no benchmark that is known; known are {', '.join(BENCHMARKS)}")
    items: dict[str, Item] = {}
    rejects: list[Reject] = []
    for file in _files(path):
        for found in _rows(file, store, benchmark):
            every = [found] if isinstance(found, Reject) else _built(benchmark, found, file)
            for item in every:
                if isinstance(item, Item):
                    _take_in(item, items, rejects)
                else:
                    rejects.append(item)
    _without_broken_circles(items, rejects, benchmark)
    if not items:
        why = "; ".join(f"{reject.row_id}: {reject.reason} {reject.detail}" for reject in rejects[:3])
        raise DataError(f"{path}: no row that {benchmark.title} could ask ({why or 'the file is empty'})")
    return Benchmarked(tuple(items.values()), tuple(rejects))


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """The first so many items (0: all), and what else belongs to their circles."""
    chosen = items[: limit or None]
    begun = {item.circle for item in chosen if item.circle}
    return [*chosen, *(item for item in items[len(chosen) :] if item.circle in begun)]


def _take_in(item: Item, items: dict[str, Item], rejects: list[Reject]) -> None:
    """Ids that come again, as those of an image with several questions, are counted on: `7`, `7#2`, ..."""
    named, number = item, 1
    while named.item_id in items:
        if items[named.item_id] == named:
            rejects.append(Reject(item.item_id, None, "duplicate"))
            return
        number += 1
        circle = item.circle and f"{item.circle}#{number}"
        named = replace(item, item_id=f"{item.item_id}#{number}", circle=circle)
    items[named.item_id] = named


def _without_broken_circles(items: dict[str, Item], rejects: list[Reject], benchmark: Benchmark) -> None:
    """A circle that lacks a member would be too easy."""
    broken = {benchmark.circle(reject.row_id) for reject in rejects if reject.reason != "duplicate"}
    for item in [item for item in items.values() if item.circle and item.circle in broken]:
        del items[item.item_id]
        rejects.append(Reject(item.item_id, None, "incomplete_circle"))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for suffix in _SUFFIXES for file in path.glob(f"*{suffix}"))
        if not files:
            raise DataError(f"{path}: a folder without {' or '.join(_SUFFIXES)} files")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: suffix {path.suffix!r} is not known; use {', '.join(_SUFFIXES)}")
    return [path]


def _rows(file: Path, store: ImageStore, benchmark: Benchmark) -> Iterator[Record | Reject]:
    if file.suffix == ".tsv":
        return _tsv_rows(file, store, benchmark)
    if file.suffix == ".json":
        return _with_images(file, _json_records(file), store, ("image",), IDS)
    return _with_images(
        file, parquet_records(file), store, benchmark.images, benchmark.ids, benchmark.several
    )


def _built(benchmark: Benchmark, record: Record, file: Path) -> Iterator[Item | Reject]:
    own = file.suffix == ".json"
    try:
        for item in prompted(record, benchmark.prompted) if own else benchmark.build(record):
            check(item)
            yield item
    except BadGold as bad:
        yield Reject(record.item_id, None, "bad_gold", str(bad), "answer")
    except BadQuestion as bad:
        yield Reject(record.item_id, None, bad.reason, bad.detail)


# ---------------------------------------------------------------- Hugging Face parquet, Prism's JSON


def _json_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """
    Raises:
        DataError: the file is no list of objects.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: it must hold a list of objects with image, prompt and answer")
    yield from enumerate(rows, 1)


def _with_images(
    path: Path,
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    store: ImageStore,
    columns: Sequence[str],
    ids: Sequence[str],
    several: bool = False,
) -> Iterator[Record | Reject]:
    """The rows with the images of the first of these columns that has any, or of all of them; each holds one
    image or a list.
    """
    for number, values in rows:
        name = place(path, number)
        try:
            name = _id(values, name, ids)
            found = [cells for column in columns if (cells := _several(values.get(column)))]
            images = [
                store.put(image_source(image, path.parent))
                for cells in (found if several else found[:1])
                for image in cells
            ]
            yield _record(name, images, values)
        except BadImage as bad:
            yield Reject(name, None, "bad_image", str(bad))
        except BadRow as bad:
            yield Reject(name, None, bad.reason, bad.detail)


def _several(cell: Any) -> list[Any]:
    if isinstance(cell, list):
        return cell
    return [cell] if is_given(cell) else []


# ---------------------------------------------------------------- VLMEvalKit TSV


def _tsv_rows(path: Path, store: ImageStore, benchmark: Benchmark) -> Iterator[Record | Reject]:
    images = _TsvImages(path, store)
    for number, values in enumerate(_cells(path, images.others), 1):
        name = place(path, number)
        try:
            name = _id(values, name, (*benchmark.ids, "index"))
            yield _record(name, images.of(number), values)
        except BadRow as bad:
            yield Reject(name, None, bad.reason, bad.detail)


class _TsvImages:
    """The images of a whole TSV file, read first: a row may name an image of a row that comes after it."""

    def __init__(self, path: Path, store: ImageStore) -> None:
        """
        Raises:
            DataError: the file is no TSV file, or has no column of images.
        """
        columns = list(next(_cells(path, rows=1), {}))
        column = next((name for name in ("image", "image_path") if name in columns), None)
        if column is None:
            raise DataError(f"{path}: no column 'image' or 'image_path'; it has {', '.join(columns)[:300]}")
        self.others = [name for name in columns if name != "image"]
        self._store = store
        self._folder = path.parent
        self._rows: list[tuple[ImageRef | str, ...] | BadRow] = []  # a text: the index of the row that has it
        self._of_index: dict[str, int] = {}
        for values in _cells(path, ["index", column]):
            self._of_index.setdefault(values.get("index", ""), len(self._rows))
            self._rows.append(self._read(values[column], named=column == "image"))

    def of(self, number: int) -> tuple[ImageRef, ...]:
        """Of the row with this number, from 1.

        Raises:
            BadRow: one of them cannot be had.
        """
        found: list[ImageRef] = []
        for part in _sound(self._rows[number - 1]):
            if isinstance(part, ImageRef):
                found.append(part)
                continue
            if part not in self._of_index:
                raise BadRow("missing_image", f"the image is that of row {part!r}, which is not there")
            named = _sound(self._rows[self._of_index[part]])
            if not all(isinstance(one, ImageRef) for one in named):
                raise BadRow("missing_image", f"the image is that of row {part!r}, which names a row itself")
            found += [one for one in named if isinstance(one, ImageRef)]
        return tuple(found)

    def _read(self, cell: str, named: bool) -> tuple[ImageRef | str, ...] | BadRow:
        try:
            parts = literal(cell) if cell.startswith("[") else [cell]
            if not parts or not all(isinstance(part, str) and part for part in parts):
                raise BadRow("missing_image")
            return tuple(self._part(part, named) for part in parts)
        except BadRow as bad:
            return bad
        except (BadImage, binascii.Error, ValueError) as error:
            return BadRow("bad_image", str(error))

    def _part(self, part: str, named: bool) -> ImageRef | str:
        if not named:
            return self._store.put(image_source(part, self._folder))
        return part if len(part) <= _REFERENCE else self._store.put(base64.b64decode(part, validate=True))


def _sound(row: tuple[ImageRef | str, ...] | BadRow) -> tuple[ImageRef | str, ...]:
    if isinstance(row, BadRow):
        raise row
    return row


def _cells(path: Path, columns: list[str] | None = None, rows: int | None = None) -> Iterator[dict[str, str]]:
    """Rows as texts as they stand: "None" and "NA" are options, not missing values.

    Raises:
        DataError: the file is no TSV file.
    """
    wanted = None if columns is None else columns.__contains__
    try:
        with pd.read_csv(
            path, sep="\t", dtype=str, keep_default_na=False, chunksize=_CHUNK, usecols=wanted, nrows=rows
        ) as chunks:
            for chunk in chunks:
                yield from (
                    {str(name): cell for name, cell in row.items()} for row in chunk.to_dict("records")
                )
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable TSV file: {error}") from error


# ---------------------------------------------------------------- both


def _id(values: Mapping[str, Any], otherwise: str, ids: Sequence[str]) -> str:
    found = next((values[name] for name in ids if values.get(name) not in (None, "")), None)
    return id_of(found, otherwise)


def _record(item_id: str, images: Sequence[ImageRef], values: Mapping[str, Any]) -> Record:
    if not images:
        raise BadRow("missing_image")
    return Record(item_id, tuple(images), values)
