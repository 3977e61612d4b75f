"""Broken, odd and hostile images: each is refused with a reason, or all who come later can read it."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_kit import MAX_PIXELS, MIN_PIXELS, tiny_model
from PIL import Image
from replay_kit import (
    StubJudge,
    StubLearner,
    StubRollout,
    connected,
    make_config,
    png,
    run,
    running,
    write_data,
)

from caprl_async.data import images
from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.processor import PolicyProcessor, UnreadableImage, read_image, read_size
from caprl_async.types import ImageRef, Version

BROKEN = 60  # of each good file


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PolicyProcessor:
    return PolicyProcessor(tiny_model("policy", tmp_path_factory.mktemp("model")), MIN_PIXELS, MAX_PIXELS)


def noise(mode: str, width: int = 61, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@functools.cache
def good_files() -> dict[str, bytes]:
    """One of everything that data sets hold."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    films = {"save_all": True, "append_images": [noise("RGB").rotate(90 * i) for i in range(1, 4)]}
    files = {f"{form} {mode}": encoded(noise(mode), form) for form, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
        "GIF": ("1", "L", "P", "RGBA"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16"),
        "WEBP": ("L", "RGB", "RGBA"),
        "BMP": ("1", "L", "P", "RGB"),
        "PPM": ("1", "L", "RGB"),
    }.items() for mode in modes}  # fmt: skip
    files |= {
        f"{form} rotated": encoded(noise("RGB"), form, exif=rotated) for form in ("JPEG", "PNG", "WEBP")
    }
    files |= {f"{form} film": encoded(noise("RGB"), form, **films) for form in ("GIF", "WEBP", "TIFF", "PNG")}
    files["TIFF rotated"] = encoded(noise("RGB"), "TIFF", tiffinfo={0x0112: 6})
    files["TIFF packed"] = encoded(noise("RGB"), "TIFF", compression="tiff_lzw")
    files["JPEG progressive"] = encoded(noise("RGB"), "JPEG", progressive=True)
    files["PNG transparent"] = encoded(noise("P"), "PNG", transparency=3)
    files["PNG 1 x 1"] = encoded(noise("RGB", 1, 1), "PNG")
    files["PNG 200 x 1"] = encoded(noise("RGB", 200, 1), "PNG")
    files["PNG 3 x 597"] = encoded(noise("RGB", 3, 597), "PNG")
    for form in ("JPEG2000", "AVIF"):
        if form in images._known():
            files[form] = encoded(noise("RGB"), form)
    return files


def read_by_all(ref: ImageRef, processor: PolicyProcessor | None = None) -> None:
    """As rollout, engine and learner read it."""
    image = read_image(ref)
    assert image.mode == "RGB"
    assert image.size == read_size(ref)
    if processor is not None:
        pixels = processor.pixels(ref)
        assert pixels.grid == processor.grid(*image.size)
        assert bool(pixels.pixel_values.isfinite().all())


@pytest.mark.parametrize("name", good_files())
def test_good_images_of_every_kind_are_read(name: str, store: ImageStore, processor: PolicyProcessor) -> None:
    ref = store.put(good_files()[name])
    read_by_all(ref, processor)
    seen = np.asarray(read_image(ref))
    assert 60 < seen.mean() < 200, "noise is neither black nor white"


def test_sixteen_bits_are_made_eight(store: ImageStore) -> None:
    levels = np.arange(0, 2**16, 256, dtype=np.uint16).repeat(4).reshape(32, 32)
    for form in ("PNG", "TIFF"):
        seen = np.asarray(read_image(store.put(encoded(Image.fromarray(levels), form))))
        assert (seen == (levels >> 8)[..., None]).all()
    for kind in (np.int32, np.float32):
        with pytest.raises(BadImage, match="white"):
            store.put(encoded(Image.fromarray(levels.astype(kind)), "TIFF"))


def broken(whole: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    data = bytearray(whole)
    at = chance.randrange(len(data))
    match seed % 6:
        case 0:
            del data[at:]
        case 1:
            for _ in range(chance.randrange(1, 20)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:  # of the header
            data[chance.randrange(min(len(data), 60))] = chance.choice((0, 1, 127, 128, 255))
        case 3:
            data[at : at + 64] = bytes(64)
        case 4:
            del data[at : at + chance.randrange(1, 40)]
        case _:
            data[at:at] = chance.randbytes(chance.randrange(1, 40))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # PIL's, at broken files
def test_what_is_taken_can_be_read_and_the_rest_is_named(
    store: ImageStore, processor: PolicyProcessor
) -> None:
    taken = refused = 0
    for name, whole in good_files().items():
        for seed in range(BROKEN):
            try:
                ref = store.put(broken(whole, seed))
            except BadImage:
                refused += 1
                continue
            except BaseException as error:
                pytest.fail(f"{name}, seed {seed}: {type(error).__name__}: {error}")
            taken += 1
            try:
                read_by_all(ref, processor if taken % 20 == 0 else None)
            except BaseException as error:
                pytest.fail(f"{name}, seed {seed}, was taken, then: {type(error).__name__}: {error}")
    assert taken > 200
    assert refused > 1000
    assert not list(store.folder.rglob(".part-*"))


def test_a_file_that_changes_later_is_named(store: ImageStore) -> None:
    ref = store.put(png(1))
    for changed in {broken(png(1), seed) for seed in range(200)} - {png(1)}:
        Path(ref.path).write_bytes(changed)
        with pytest.raises(UnreadableImage, match=ref.sha256):
            read_image(ref)
        with suppress(UnreadableImage):
            read_size(ref)


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_image_is_refused(store: ImageStore, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({ran}) (w) file closefile\nshowpage\n"
    texts = [
        "",
        "text",
        "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "%PDF-1.7\n",
        "<html>",
        "GIF89a",
        "BM",
        "\0" * 9,
    ]
    texts += [
        "\x89PNG\r\n\x1a\n",
        "RIFF0000WEBPVP8 ",
        "II*\0\x08\0\0\0",
        "P6 2 2 255 ",
        "P6 0 0 255\n",
        "P1\n",
        postscript,
    ]
    chance = random.Random(0)
    for data in [
        *(t.encode("latin-1") for t in texts),
        *(chance.randbytes(chance.randrange(400)) for _ in range(2000)),
    ]:
        with pytest.raises(BadImage):
            store.put(data)
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), Path("/proc/self/mem")):
        with pytest.raises(BadImage, match=str(path)[:40]):
            store.put(path)
    assert not ran.exists()
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


def test_a_file_too_large_to_be_an_image_is_not_read(store: ImageStore, tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(BadImage, match=str(images.MAX_BYTES)):
        store.put(tmp_path / "sparse.png")


# ---------------------------------------------------------------- claims


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hollow_png(width: int, height: int, pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit per pixel
    data = _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + data


def whole_png(width: int, height: int) -> bytes:
    """All pixels are there, in a few kB."""
    return hollow_png(width, height, bytes((1 + (width + 7) // 8) * height))


def bombs() -> Iterator[tuple[str, bytes]]:
    for size in (20_000, 50_000, 2**31 - 1):
        yield f"png {size}", hollow_png(size, size)
    yield "png, whole", whole_png(20_000, 20_000)
    files = good_files()
    patched: list[tuple[str, bytes, bytes]] = [
        ("GIF P", struct.pack("<HH", 61, 40), struct.pack("<HH", 65_535, 65_535)),
        ("BMP RGB", struct.pack("<ii", 61, 40), struct.pack("<ii", 50_000, 50_000)),
        ("JPEG RGB", struct.pack(">HH", 40, 61), struct.pack(">HH", 65_500, 65_500)),
        ("TIFF RGB", struct.pack("<HHII", 256, 4, 1, 61), struct.pack("<HHII", 256, 4, 1, 5_000_000)),
        ("PPM RGB", b"61 40", b"50000 50000"),
    ]
    for name, claim, more in patched:
        assert claim in files[name], name
        yield name, files[name].replace(claim, more)
    if "JPEG2000" in files:
        yield (
            "JPEG2000",
            files["JPEG2000"].replace(struct.pack(">II", 40, 61), struct.pack(">II", 60_000, 60_000)),
        )


_IN_A_PROCESS = """
import json, resource, sys
from pathlib import Path
from caprl_async.data.images import BadImage, ImageStore

store, said = ImageStore(sys.argv[1] + "/store"), {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).glob("*.bomb")):
    try:
        said[path.stem] = store.put(path).path
    except BadImage as error:
        said[path.stem] = str(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"said": said, "grown_mb": grown / 1024}))
"""


def test_bombs_are_not_decoded(tmp_path: Path) -> None:
    for name, data in bombs():
        (tmp_path / f"{name}.bomb").write_bytes(data)
    arguments = [sys.executable, "-W", "ignore", "-c", _IN_A_PROCESS, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    for name, said in result["said"].items():
        assert str(images.MAX_PIXELS) in said or str(2 * images.MAX_PIXELS) in said, (name, said)
    assert len(result["said"]) >= 9
    assert result["grown_mb"] < 50


def test_long_images_are_read_up_to_the_limit_that_refusals_name(
    store: ImageStore, processor: PolicyProcessor
) -> None:
    longest = images.MAX_ASPECT
    for width, height in ((20_000, 1_000), (100, 20_000), (longest, 1), (1, longest), (5 * longest, 5)):
        read_by_all(store.put(whole_png(width, height)), processor)
    for width, height in ((20_000, 1), (1, 20_000), (longest + 1, 1), (3, 3 * longest + 1), (20_000, 99)):
        with pytest.raises(BadImage, match=f"{width} x {height} px.* {longest} times"):
            store.put(whole_png(width, height))
        with pytest.raises(UnreadableImage):  # no image is refused that could be captioned
            processor.grid(width, height)


# ---------------------------------------------------------------- in the ring


def test_a_run_goes_on_without_the_bad_images(tmp_path: Path) -> None:
    bad = [
        b"",
        b"text",
        png(1)[:40],
        hollow_png(50_000, 50_000),
        whole_png(20_000, 1),
        good_files()["JPEG RGB"][:99],
    ]
    encoded_rows = [png(i) if i % 2 else bad[i // 2 % len(bad)] for i in range(24)]

    async def whole() -> None:
        config = make_config(tmp_path)
        column = [{"bytes": data, "path": None} for data in encoded_rows]
        config.data.train = str(write_data(tmp_path / "bad.parquet", 24, image=column))
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            trained: list[str] = []
            for step in range(3):
                batch = await learner.batch(Version(0, step))
                trained += [scored.row_id for scored in batch.groups]
                await queue.trained(Version(0, step + 1), 1.0, 2.0)
                rollout.version = Version(0, step + 1)
            audit, status = await queue.audit(), await queue.status()
        assert sorted(trained) == sorted(f"row-{i}" for i in range(1, 24, 2))
        assert audit["violations"] == []
        assert set(audit["evicted"]) == {"bad_row"}
        assert status["error_counts"]["row"] == audit["evicted"]["bad_row"]
        lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
        assert {line["row_id"] for line in lines} >= {f"row-{i}" for i in range(0, 22, 2)}
        assert {line["reason"] for line in lines} == {"bad_image", "missing_image"}

    run(whole())
