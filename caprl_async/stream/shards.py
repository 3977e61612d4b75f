"""A job's output: numbered files, each whole or absent, that say what they hold and how it was made.

One process writes, the driver. What it was given and has not written when it dies is made again by the next
start, and what is written is never made twice: so each row is in the output once.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.choices import Form
from caprl_async.data.images import extension
from caprl_async.data.rows import DataError
from caprl_async.files import write_bytes
from caprl_async.stream.done import digest_of

_KEY = b"caprl_async"  # of the parquet files' metadata
_ABOUT = "_about.json"  # readers of data sets pass over names like this
_FLUSH_S = 60.0  # rows wait no longer than this for their shard to fill
_FLUSH_BYTES = 256 << 20  # of images: rows with more wait no longer either
_GROUP_BYTES = 64 << 20  # of a parquet file's row groups


CAPTIONED = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("problem", pa.string()),  # why there is no caption; not written
        ("sha256", pa.string()),
        ("prompt", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("finish", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.int32())),
    ]
)
"""What is written of a captioned row; `path` is null where the image came as bytes."""


class Shards(ABC):
    """Files of one form in one folder. Rows are mappings with an `id`."""

    suffix: str

    def __init__(
        self, folder: Path, name: str, rows: int, about: Mapping[str, Any], schema: pa.Schema = CAPTIONED
    ) -> None:
        """`rows` of a file; `about` says how they were made, and is kept with them; `schema` what they hold.

        Raises:
            DataError: the folder holds what was made otherwise.
        """
        self.folder = folder
        self.schema = schema
        self._name = name
        self._rows = rows
        self._about = json.dumps(about, ensure_ascii=False)
        self._compare(about)
        self._waiting: list[Mapping[str, Any]] = []
        self._seen: set[bytes] = set()  # digests of the ids since the start
        self._bytes = 0  # of those that wait
        self._since = 0.0  # when the first of those that wait came
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / _ABOUT, self._about.encode())
        for left in folder.glob(".part-*"):
            left.unlink()
        self._next = max((int(file.stem.rpartition("-")[2]) for file in self.files()), default=-1) + 1

    def _compare(self, about: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        other = [name for name, value in json.loads(json.dumps(about)).items() if before.get(name) != value]
        if other and self.files():
            told = ", ".join(f"{name} {before.get(name)!r}, now {about[name]!r}" for name in other)
            raise DataError(f"{self.folder} was made otherwise ({told}); choose another run_dir")

    def files(self) -> list[Path]:
        """What is written, in order."""
        return sorted(self.folder.glob(f"{self._name}-*{self.suffix}"))

    def ids(self) -> Iterator[str]:
        """Of every row that is written.

        Raises:
            DataError: a file is damaged.
        """
        for file in self.files():
            try:
                yield from self._ids(file)
            except (pa.ArrowException, OSError, ValueError, KeyError, tarfile.TarError) as error:
                raise DataError(
                    f"{file} is damaged: {error}; take it away, and its rows are made again"
                ) from error

    def refusal(self, row: Mapping[str, Any]) -> str:
        """Why the row cannot be written; empty: it can."""
        return "another row has this id" if digest_of(row["id"]) in self._seen else ""

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes the row, sooner or later: with `flush` at the latest."""
        self._seen.add(digest_of(row["id"]))
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(row)
        self._bytes += _size(row)
        full = len(self._waiting) >= self._rows or self._bytes >= _FLUSH_BYTES
        if full or time.monotonic() - self._since > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes all that waits, to a file of its own."""
        rows, self._waiting, self._bytes = self._waiting, [], 0
        if rows:
            name = f"{self._name}-{self._next:06d}{self.suffix}"
            write_bytes(self.folder / name, self._encoded(rows))
            self._next += 1

    @abstractmethod
    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> bytes: ...

    @abstractmethod
    def _ids(self, file: Path) -> Iterator[str]: ...


def _size(row: Mapping[str, Any]) -> int:
    """Bytes of the images in a row; texts are small beside them."""
    inner = (value.get("bytes") if isinstance(value, Mapping) else value for value in row.values())
    return sum(len(value) for value in inner if isinstance(value, bytes))


class Parquet(Shards):
    """A column per field; how rows were made is in the file's metadata, under `caprl_async`."""

    suffix = ".parquet"

    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        written = pa.schema([column for column in self.schema if column.name != "problem"])
        table = pa.Table.from_pylist(list(rows), schema=written.with_metadata({_KEY: self._about.encode()}))
        groups = 1 + sum(map(_size, rows)) // _GROUP_BYTES
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=-(-len(rows) // groups))
        return sink.getvalue()

    def _ids(self, file: Path) -> Iterator[str]:
        yield from pq.read_table(file, columns=["id"])["id"].to_pylist()

    def read(self) -> Iterator[dict[str, Any]]:
        """Every row that is written."""
        for file in self.files():
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(256):
                    yield from batch.to_pylist()

    def named(self, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The rows whose ids are keys of `names`, by what those stand for."""
        return {names[row["id"]]: row for row in self.read() if row["id"] in names}


class Conversations(Shards):
    """JSON lines as ShareGPT's: a turn that asks, and the caption."""

    suffix = ".jsonl"

    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        return b"".join(
            json.dumps(_conversation(row, index), ensure_ascii=False).encode() + b"\n"
            for row in rows
            for index in range(len(row["captions"]))
        )

    def _ids(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8") as lines:
            found = (str(json.loads(line)["id"]) for line in lines)
            yield from (row_id for row_id, _ in itertools.groupby(found))  # a line for each caption


def _conversation(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {
        "id": row["id"],
        "image": row["path"] or row["id"],
        "conversations": [
            {"from": "human", "value": f"<image>\n{row['prompt']}"},
            {"from": "gpt", "value": row["captions"][index]},
        ],
    }


class WebDataset(Shards):
    """Tar files: of each row its image, its first caption as `.txt`, and everything as `.json`."""

    suffix = ".tar"

    def __init__(self, folder: Path, name: str, rows: int, about: Mapping[str, Any]) -> None:
        """See `Shards`."""
        super().__init__(folder, name, rows, about, CAPTIONED.append(pa.field("data", pa.binary())))

    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for position, row in enumerate(rows):
                key = f"{self._next:06d}{position:06d}"
                whole = {k: v for k, v in row.items() if k != "data"} | {"about": json.loads(self._about)}
                _member(tar, f"{key}{extension(row['data'])}", row["data"])
                _member(tar, f"{key}.txt", row["captions"][0].encode())
                _member(tar, f"{key}.json", json.dumps(whole, ensure_ascii=False).encode())
        return sink.getvalue()

    def _ids(self, file: Path) -> Iterator[str]:
        with tarfile.open(file) as tar:
            for member in tar:
                found = tar.extractfile(member) if member.name.endswith(".json") else None
                if found is not None:
                    yield str(json.loads(found.read())["id"])


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


FORMS: dict[Form, type[Shards]] = {
    Form.parquet: Parquet,
    Form.sharegpt: Conversations,
    Form.webdataset: WebDataset,
}
