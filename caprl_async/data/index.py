"""Examples made ready for training, once: images checked and known by their hash, texts as token ids.

One Arrow file, which every rank maps into its memory: it takes up what is read of it, not its size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import to_builtins

from caprl_async.data.examples import Example, read_examples
from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.processor import (
    Grid,
    PolicyProcessor,
    UnreadableImage,
    UnsupportedModel,
    read_size,
)
from caprl_async.data.rows import DataError, Reject, append_rejects
from caprl_async.data.video import FrameLimits, keep_video
from caprl_async.files import sync_file
from caprl_async.types import Frame, ImageRef

_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("sha256", pa.string()),
        ("path", pa.string()),
        ("frames", pa.list_(pa.struct({"sha256": pa.string(), "path": pa.string(), "time": pa.float64()}))),
        ("grids", pa.list_(pa.list_(pa.int32(), 3))),
        ("prompt", pa.list_(pa.int32())),  # one placeholder for each picture
        ("texts", pa.list_(pa.list_(pa.int32()))),  # each with its end token
    ]
)
_ABOUT = b"caprl_async"
_GROUP = 4096  # rows of a batch of the file


@dataclass(frozen=True)
class Ready:
    """One row of the index."""

    row_id: str
    image: ImageRef
    grids: tuple[Grid, ...]  # of each picture
    prompt: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class IndexSpec:
    """What an index is made from; another one is made anew."""

    data: str
    prompt: str  # of examples without one of their own
    max_tokens: int  # longer texts are left out
    videos: FrameLimits | None = None  # None: none are taken


class Index:
    """The rows of an index file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Ready:
        row: dict[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        frames = tuple(Frame(**frame) for frame in row["frames"])
        return Ready(
            row["row_id"],
            ImageRef(sha256=row["sha256"], path=row["path"], frames=frames),
            tuple((t, h, w) for t, h, w in row["grids"]),
            tuple(row["prompt"]),
            tuple(map(tuple, row["texts"])),
        )


def make_index(
    path: Path,
    spec: IndexSpec,
    processor: PolicyProcessor,
    images: Path,
    rejects: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Index:
    """The index of `spec` at `path`, made if it is not there; `progress(rows)` hears how far it is.

    Images that come as bytes are kept below `images`, others stay where they are. What cannot be used is
    written to `rejects`.

    Raises:
        DataError: no example can be used, or one is a video and none are taken.
    """
    about = _about(spec, processor, images)
    if path.is_file() and _made_as(path) == about:
        return Index(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    store = ImageStore(images)
    refused: list[Reject] = []
    written = 0
    schema = _SCHEMA.with_metadata({_ABOUT: about})
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for rows in _groups(spec, processor, store, refused):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            written += len(rows)
            progress(written)
    append_rejects(rejects, Path(spec.data), refused)
    if not written:
        partial.unlink()
        why = f"{len(refused)} were turned away, the first: {refused[0].reason}" if refused else "it is empty"
        raise DataError(f"{spec.data}: no example can be used ({why}); see {rejects}")
    sync_file(partial)
    partial.replace(path)
    return Index(path)


def _made_as(path: Path) -> bytes | None:
    """What an index says that it was made from; None if it is damaged."""
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
    except (pa.ArrowException, OSError):
        return None
    found: bytes | None = metadata.get(_ABOUT)
    return found


def _groups(
    spec: IndexSpec, processor: PolicyProcessor, store: ImageStore, refused: list[Reject]
) -> Iterator[list[dict[str, Any]]]:
    prompt_ids = lru_cache(maxsize=1024)(processor.prompt_ids)
    rows: list[dict[str, Any]] = []
    for example in read_examples(Path(spec.data)):
        if isinstance(example, Reject):
            refused.append(example)
            continue
        row = _row(example, spec, processor, store, prompt_ids)
        if isinstance(row, Reject):
            refused.append(row)
            continue
        rows.append(row)
        if len(rows) == _GROUP:
            yield rows
            rows = []
    if rows:
        yield rows


def _row(
    example: Example,
    spec: IndexSpec,
    processor: PolicyProcessor,
    store: ImageStore,
    prompt_ids: Callable[[str, tuple[float, ...]], tuple[int, ...]],
) -> dict[str, Any] | Reject:
    texts = [ids for text in example.texts if (ids := processor.answer_ids(text)) is not None]
    short = [ids for ids in texts if len(ids) <= spec.max_tokens]
    if not short:
        reason = "too_long" if texts else "not_in_vocabulary"
        return Reject(example.row_id, None, reason, example.texts[0][:200])
    try:
        image = _kept(example, store, spec.videos)
        grids = [processor.grid(*read_size(picture)) for picture in image.pictures]
    except (BadImage, UnreadableImage) as error:
        return Reject(example.row_id, None, "bad_image", str(error), column="image")
    prompt = example.prompt or spec.prompt
    if not prompt:
        return Reject(example.row_id, None, "no_prompt", "and data.prompt is empty")
    try:
        asked = prompt_ids(prompt, image.times)
    except UnsupportedModel as error:  # it holds an image's placeholder, say
        return Reject(example.row_id, None, "bad_prompt", str(error)[:300], column="prompt")
    return {
        "row_id": example.row_id,
        "sha256": image.sha256,
        "path": image.path,
        "frames": [to_builtins(frame) for frame in image.frames],
        "grids": [list(grid) for grid in grids],
        "prompt": list(asked),
        "texts": [list(ids) for ids in short],
    }


def _kept(example: Example, store: ImageStore, videos: FrameLimits | None) -> ImageRef:
    """
    Raises:
        BadImage: see `ImageStore.put` and `keep_video`.
        DataError: it is a video, and none are taken.
    """
    image = example.image
    if example.video:
        if videos is None:
            raise DataError(f"{example.row_id} is a video; data.frames says as how many frames each is shown")
        return keep_video(store, image, videos)
    return store.put(image) if isinstance(image, bytes) else store.refer(image)


def _about(spec: IndexSpec, processor: PolicyProcessor, images: Path) -> bytes:
    source = Path(spec.data)
    files = [source] if source.is_file() else sorted(source.glob("*"))
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    videos = spec.videos and asdict(spec.videos)
    kept = str(images.resolve())  # an index names the files: of a moved run it is made again
    made_from = [spec.data, spec.prompt, spec.max_tokens, videos, processor.fingerprint, state, kept]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest().encode()


def rows_of_step(step: int, batch: int, total: int, seed: int) -> list[int]:
    """Numbers of the rows that step `step` (from 0) trains on: passes over all rows, each in an order of its
    own that depends on (seed, pass) alone, without a break between passes."""
    found: list[int] = []
    at = step * batch
    while len(found) < batch:
        epoch, position = divmod(at + len(found), total)
        order = _order(epoch, total, seed)
        found += order[position : position + batch - len(found)].tolist()
    return found


@lru_cache(maxsize=2)
def _order(epoch: int, total: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)
