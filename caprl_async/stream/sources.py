"""Where images come from: folders, parquet, WebDataset, Hugging Face data sets on disk; as a Ray data set.

Every source gives rows of SCHEMA. An image is in `data`, or the file at `path`; a row with neither, and a
`problem`, is one that its source could not give.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_async.data.rows import BadRow, DataError, id_of
from caprl_async.types import ImageData, ImageRef

SCHEMA = pa.schema(
    [("id", pa.string()), ("path", pa.string()), ("data", pa.binary()), ("problem", pa.string())]
)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm")
"""Of the files that count as images in a folder, or in a tar file."""

_BLOCK = 512  # files of a folder that one task takes
_COLUMNS = ("image", "jpg", "png", "img")  # that may hold an image, in order
_IDS = ("id", "image_id", "__key__")


@dataclass(frozen=True)
class Images:
    """Rows of SCHEMA, and how many there are, if that is known without reading them."""

    rows: Any  # a ray.data.Dataset, whose own annotations fit no plain function
    total: int | None


def open_images(source: str) -> Images:
    """All images of a folder of images, of .parquet or .tar files, or of the .arrow files that
    `datasets.Dataset.save_to_disk` leaves; or of one such file.

    A row's id is its path in the folder, its `id` or `image_id`, its tar file's name and its key in there, or
    else the SHA-256 of its image.

    Raises:
        DataError: there is no such thing, or nothing in it is of a known form.
    """
    import ray.data

    reading: Any = ray.data
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; set data.images")
    parquet, tar, arrow = (_files(path, suffix) for suffix in (".parquet", ".tar", ".arrow"))
    if parquet:
        columns, total = _parquet_head(parquet)
        tables = reading.read_parquet(parquet).select_columns(columns)
        rows = tables.map_batches(_from_table, batch_format="pyarrow", fn_kwargs={"folder": str(path)})
        return Images(rows, total)
    if tar:
        samples = reading.read_webdataset(tar, decoder=None, include_paths=True)
        return Images(samples.map(_from_sample), None)
    if arrow:
        files = reading.from_arrow([pa.table({"file": [file]}) for file in arrow])
        return Images(files.map_batches(_from_arrow, batch_size=1), None)
    found = list(_images(path))
    if not found:
        raise DataError(f"{source}: it holds no image, nor a .parquet, .tar or .arrow file")
    base = path if path.is_dir() else path.parent
    rows = [_of_file(file, base) for file in found]
    return Images(table_of(rows, SCHEMA), len(rows))


def _parquet_head(files: list[str]) -> tuple[list[str], int]:
    """The columns that are read, and the rows of all files.

    Raises:
        DataError: a file is damaged or has no column of images.
    """
    total = 0
    wanted: list[str] | None = None
    for file in files:
        try:
            head = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file: {error}") from error
        names = head.schema.to_arrow_schema().names
        _needs_image(names, file)
        total += head.num_rows
        own = [name for name in (*_IDS, *_COLUMNS) if name in names]
        if wanted is not None and own != wanted:
            raise DataError(f"{file}: it has {', '.join(own)}, other files of the folder {', '.join(wanted)}")
        wanted = own
    return wanted or [], total


def listed(images: Iterable[ImageRef]) -> Any:
    """A ray.data.Dataset of SCHEMA, of images that lie in files; their ids are their hashes."""
    return table_of([{"id": image.sha256, "path": image.path} for image in images], SCHEMA)


def image_of(row: Mapping[str, Any]) -> ImageData:
    """The image of a row of SCHEMA.

    Raises:
        OSError: its file cannot be read.
    """
    return ImageData.of(row["data"] if row["data"] is not None else Path(row["path"]).read_bytes())


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> Any:
    """A ray.data.Dataset of these rows, at least one."""
    import ray.data

    reading: Any = ray.data
    blocks = [list(rows[at : at + _BLOCK]) for at in range(0, len(rows), _BLOCK)]
    return reading.from_arrow([pa.Table.from_pylist(block, schema=schema) for block in blocks])


def _files(path: Path, suffix: str) -> list[str]:
    if path.is_file():
        return [str(path)] if path.suffix == suffix else []
    return sorted(str(file) for file in path.glob(f"*{suffix}"))


def _images(path: Path) -> Iterator[Path]:
    if path.is_file():
        if path.suffix.lower() in EXTENSIONS:
            yield path
        return
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS):
                yield Path(folder, name)


def _of_file(file: Path, base: Path) -> dict[str, Any]:
    name, path = str(file.relative_to(base)), str(file.resolve())
    try:
        (name + path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        return {"id": shown, "path": None, "problem": "its name is not UTF-8: rename the file"}
    return {"id": name, "path": path}


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _needs_image(columns: list[str], source: str) -> None:
    if not set(columns) & set(_COLUMNS):
        raise DataError(f"{source}: no column {' or '.join(_COLUMNS)}; it has {', '.join(columns)[:300]}")


def _from_table(table: pa.Table, folder: str) -> pa.Table:
    return _table([_row(values, Path(folder)) for values in table.to_pylist()])


def _from_arrow(batch: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The record batches of one file that `datasets` has saved, an IPC stream."""
    (file,) = batch["file"]
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            _needs_image(stream.schema.names, str(file))
            for found in stream:
                yield _from_table(pa.Table.from_batches([found]), str(Path(file).parent))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Arrow stream: {error}") from error


def _from_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of a tar file: its files by extension."""
    images = [value for name, value in sample.items() if f".{name.lower()}" in EXTENSIONS]
    row_id = f"{Path(str(sample['path'])).name}/{sample['__key__']}"  # keys may begin anew in each file
    return _found(row_id, images[0] if images else None, Path())


def _row(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    image = next((values[name] for name in _COLUMNS if values.get(name) is not None), None)
    try:
        row_id = next((found for name in _IDS if (found := id_of(values.get(name), ""))), "")
    except BadRow as bad:
        return {"id": "", "path": None, "data": None, "problem": str(bad)}
    return _found(row_id, image, folder)


def _found(row_id: str, image: Any, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"id": row_id, "path": None, "data": None, "problem": None}
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        row["data"] = image
        row["id"] = row_id or hashlib.sha256(image).hexdigest()
    elif isinstance(image, str) and image:
        row["path"] = str((folder if folder.is_dir() else folder.parent) / image)
        row["id"] = row_id or image
    else:
        row["problem"] = "the row has no image"
    return row
