"""Makes the tiny world's videos: bars that cross the picture, one in each second or none, and what was when.

`python -m caprl_async.tiny.video --out runs/clips --seed 0` writes train, heldout and heldout_alt parquet
files of the CapRL-QA form with a `video` column (MP4), and sparse.parquet: such videos with captions as
people write them, for supervised training. A bar's place among `first` to `fourth` is its second, wherever
it is seen.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from caprl_async.tiny import grammar
from caprl_async.tiny.draw import SIZE, paint
from caprl_async.tiny.grammar import SLOTS, Entity
from caprl_async.tiny.world import World, asked_about, sample_world, write_parquet

FPS = 4
SECONDS = len(SLOTS)
_BIT_RATE = 1_000_000  # colours must survive


def pictures(world: World) -> Iterator[Image.Image]:
    """The frames: in second k the bar of slot k, if there is one, crosses from one column to another."""
    rng = random.Random(world.noise)
    by_slot = {entity.place: entity for entity in world.entities}
    for slot in SLOTS:
        entity, columns = by_slot.get(slot), rng.sample(SLOTS, 2)
        jitter = rng.getrandbits(32)  # one bar keeps its size and shade
        start, end = (paint("bars", _at(entity, column), random.Random(jitter)) for column in columns)
        for k in range(FPS):
            yield start if k < FPS / 2 else end


def _at(entity: Entity | None, column: str) -> tuple[Entity, ...]:
    return () if entity is None else (Entity(column, entity.color, entity.value),)


def encoded(world: World) -> bytes:
    """The video as MP4."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", _BIT_RATE
        for picture in pictures(world):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return buffer.getvalue()


def _column(world: World, name: str) -> dict[str, Any]:
    return {"bytes": encoded(world), "path": f"{name}.mp4"}


def rows(count: int, seed: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of a split, each in the judge's and in the held-out judge's wording."""
    rng = random.Random(seed)
    for index in range(count):
        world = sample_world(rng, "bars")
        name = f"{seed}-{index:05d}"
        yield asked_about(world, name, {"video": _column(world, name)}, rng)


def captioned(count: int, seed: str) -> Iterator[dict[str, Any]]:
    """Videos with sparse captions."""
    rng = random.Random(seed)
    for index in range(count):
        world = sample_world(rng, "bars")
        name = f"{seed}-{index:05d}"
        yield {
            "id": name,
            "video": _column(world, name),
            "caption": grammar.sparse_caption(world.entities, rng),
        }


def write_videos(out: Path, seed: int, train: int = 1000, heldout: int = 100, sparse: int = 2000) -> None:
    """Writes the four files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_parquet([first for first, _ in rows(train, f"train-{seed}")], out / "train.parquet")
    pairs = list(rows(heldout, f"heldout-{seed}"))
    write_parquet([first for first, _ in pairs], out / "heldout.parquet")
    write_parquet([second for _, second in pairs], out / "heldout_alt.parquet")
    write_parquet(list(captioned(sparse, f"sparse-{seed}")), out / "sparse.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_videos(args.out, args.seed)


if __name__ == "__main__":
    main()
