"""Rows of parquet files as plain values, a damaged cell costing no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.data.rows import DataError

_BATCH = 256  # rows decoded at a time
_NO_VALUE = (pa.ArrowException, ValueError, OverflowError)  # broken UTF-8, a date beyond Python's years


def parquet_records(
    path: Path,
    needed: Sequence[str] = (),
    optional: Sequence[str] | None = None,
    either: Sequence[str] = (),
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, values by column) of every row; a value that is none for Python is the error itself.

    Only the columns `needed`, `either` and `optional` are read; with `optional` None, all.

    Raises:
        DataError: no parquet file, a damaged one, a needed column is missing, or all of `either` are.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            missing = [name for name in needed if name not in columns]
            if either and not set(either) & set(columns):
                missing.append(either[0])
            if missing:
                raise DataError(
                    f"{path}: column {missing[0]!r} is missing; the file has {', '.join(columns)}"
                )
            wanted = (
                columns if optional is None else [c for c in (*needed, *either, *optional) if c in columns]
            )
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                for record in _records(batch):
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _records(batch: pa.RecordBatch) -> Iterable[Mapping[str, Any]]:
    """The rows of a batch; where a value is none for Python, the error stands in its place."""
    try:
        return batch.to_pylist()
    except _NO_VALUE:
        names = batch.schema.names
        return [{name: _value(batch.column(name), row) for name in names} for row in range(len(batch))]


def _value(column: pa.Array, row: int) -> Any:
    try:
        return column[row].as_py()
    except _NO_VALUE as error:
        return error
