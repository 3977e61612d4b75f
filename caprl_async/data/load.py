"""The one door to data files: `load_rows` knows every form and hands out checked rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from caprl_async.data import caprl_qa, jsonl, openrlhf, verl
from caprl_async.data.rows import DataError, Dataset, Reject, Row

_SHOWN = 100  # characters of a column's name

Reader = Callable[[Path, str], Iterator[Row | Reject]]


def load_rows(path: str | Path, abstain: str) -> Dataset:
    """All usable rows of a file, or of a folder of parquet files; what is not usable is in `rejects`.

    `abstain` is the text of the option that the judge adds (judge.prompt.abstain): choices that say the same
    are taken out.

    Raises:
        DataError: the file is missing, of no known form, or holds no usable row.
    """
    path = Path(path)
    rows: dict[str, Row] = {}
    rejects: list[Reject] = []
    for file in _files(path):
        for item in _reader(file)(file, abstain):
            if isinstance(item, Reject):
                rejects.append(item)
            elif item.row_id in rows:
                rejects.append(Reject(item.row_id, None, "duplicate_id", column="id"))
            else:
                rows[item.row_id] = item
    dataset = Dataset(path, tuple(rows.values()), tuple(rejects))
    if not rows:
        why = ", ".join(f"{n} {reason}" for reason, n in dataset.reject_counts.items())
        raise DataError(f"{path}: no usable row ({why or 'the file is empty'})")
    return dataset


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise DataError(f"{path}: a folder without .parquet files")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file; set data.train or data.heldout to a .parquet or .jsonl file")
    return [path]


def _reader(path: Path) -> Reader:
    if path.suffix == ".parquet":
        return caprl_qa.read
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: suffix {path.suffix!r} is not known; use .parquet or .jsonl")
    found: list[str] = []
    for _, record in jsonl.lines(path):
        if isinstance(record, Reject):
            continue
        if "message" in record:
            return openrlhf.read
        if "reward_model" in record:
            return verl.read
        found = found or [name[:_SHOWN] for name in record]
    if not found:
        raise DataError(f"{path}: no line holds a JSON object with columns")
    raise DataError(
        f"{path}: neither column 'message' (OpenRLHF) nor column 'reward_model' (verl); "
        f"the first line has {', '.join(found)}"
    )
