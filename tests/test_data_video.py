"""Videos as frames in the image store: which ones, when, and what is no video."""

from __future__ import annotations

import io
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caprl_async.config import Config
from caprl_async.data.caprl_qa import read_record
from caprl_async.data.examples import Example, read_examples
from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.load import load_rows
from caprl_async.data.rows import DataError, Row
from caprl_async.data.video import FrameLimits, check_videos, frame_times, frames_of, keep_row, keep_video
from caprl_async.tiny import video as tiny_video
from caprl_async.tiny.world import write_parquet

LIMITS = FrameLimits(frames=8, fps=1.0, max_pixels=10_000)


def film(
    seconds: int, fps: int = 4, size: tuple[int, int] = (64, 48), form: str = "mp4", codec: str = "mpeg4"
) -> bytes:
    """Second k is a grey of its own: 10 + 20 * k."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.gop_size = 12
        for number in range(seconds * fps):
            grey = 10 + 20 * (number // fps) % 240
            picture = np.full((size[1], size[0], 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def grey(image: Image.Image) -> float:
    return float(np.asarray(image.convert("L")).mean())


@given(
    duration=st.floats(0.01, 1e5),
    frames=st.integers(1, 500),
    fps=st.floats(0.01, 60),
)
def test_frames_are_spread_evenly_from_the_start_and_within_the_limits(
    duration: float, frames: int, fps: float
) -> None:
    times = frame_times(duration, FrameLimits(frames, fps, 1))
    assert times[0] == 0
    assert 1 <= len(times) <= frames
    assert times[-1] < duration
    gaps = np.diff(times)
    assert np.allclose(gaps, duration / len(times))
    if len(times) < frames:  # then there are as many a second as asked for, at the least
        assert len(times) >= duration * fps - 1e-6


@pytest.mark.parametrize(("form", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4")])
def test_each_frame_is_the_one_of_its_second(form: str, codec: str) -> None:
    found = list(frames_of(film(6, form=form, codec=codec), LIMITS))
    assert [round(time) for time, _ in found] == [0, 1, 2, 3, 4, 5]
    for time, image in found:
        assert grey(image) == pytest.approx(10 + 20 * round(time), abs=5)


def test_of_a_long_video_as_many_frames_are_taken_as_allowed(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    path.write_bytes(film(120))
    found = list(frames_of(path, LIMITS))  # 15 seconds between frames: these are jumped
    assert [time for time, _ in found] == pytest.approx([15 * k for k in range(8)], abs=0.3)
    for time, image in found:
        assert grey(image) == pytest.approx(10 + 20 * round(time) % 240, abs=6)


def test_large_frames_are_made_smaller() -> None:
    ((_, image), *_) = frames_of(film(1, size=(640, 360)), LIMITS)
    assert image.width * image.height == pytest.approx(LIMITS.max_pixels, rel=0.02)
    assert image.width / image.height == pytest.approx(640 / 360, rel=0.02)


def test_frames_are_kept_once_as_pictures_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(tmp_path / "store")
    data = film(3)
    video = keep_video(store, data, LIMITS)
    assert video.times == (0.0, 1.0, 2.0)
    assert video.path == video.frames[0].path
    assert [grey(Image.open(p.path)) for p in video.pictures] == pytest.approx([10, 30, 50], abs=5)
    other = keep_video(store, data, FrameLimits(2, 1.0, 10_000))
    assert other.sha256 != video.sha256
    assert len(other.frames) == 2
    monkeypatch.setattr("caprl_async.data.video.frames_of", None)  # it is not decoded again
    assert keep_video(store, data, LIMITS) == video


def test_frames_that_are_gone_are_taken_again(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    video = keep_video(store, film(2), LIMITS)
    Path(video.frames[1].path).unlink()
    assert keep_video(store, film(2), LIMITS) == video
    assert Path(video.frames[1].path).is_file()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no video at all",
        film(2)[:700],
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, data: bytes) -> None:
    store = ImageStore(tmp_path / "store")
    with pytest.raises(BadImage):
        keep_video(store, data, LIMITS)
    path = tmp_path / "film.mp4"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"film\.mp4"):
        keep_video(store, path, LIMITS)
    with pytest.raises(BadImage, match="missing"):
        keep_video(store, tmp_path / "missing.mp4", LIMITS)


def test_rows_of_videos_need_a_conf_that_takes_them(tmp_path: Path) -> None:
    write_parquet([first for first, _ in tiny_video.rows(2, "x")], tmp_path / "a.parquet")
    data = load_rows(tmp_path / "a.parquet", "unknown")
    assert [row.video for row in data] == [True, True]
    assert data.rows[0].prompt == "describe the image ."
    store, config = ImageStore(tmp_path / "store"), Config()
    with pytest.raises(DataError, match=r"data\.frames"):
        check_videos(data, config)
    with pytest.raises(BadImage, match="only images"):
        keep_row(store, data.rows[0], FrameLimits.of(config))
    config.data.frames = 4
    check_videos(data, config)
    video = keep_row(store, data.rows[0], FrameLimits.of(config))
    assert video.times == (0.0, 1.0, 2.0, 3.0)


def test_the_tiny_worlds_videos_show_what_their_facts_say(tmp_path: Path) -> None:
    from caprl_async.tiny.draw import RGB
    from caprl_async.tiny.grammar import SLOTS

    for first, second in tiny_video.rows(6, "seed"):
        assert first["video"] == second["video"]
        frames = list(frames_of(first["video"]["bytes"], FrameLimits(4, 1.0, 1 << 20)))
        assert len(frames) == len(SLOTS)
        by_slot = {entity["place"]: entity for entity in json.loads(first["facts"])["entities"]}
        for slot, (_, image) in zip(SLOTS, frames, strict=True):
            pixels = np.asarray(image).astype(int).reshape(-1, 3)
            for color, rgb in RGB.items():
                if color in ("white", "black"):  # near the grey of the ground, that of the axis
                    continue
                near = int((np.abs(pixels - np.array(rgb)).max(axis=1) < 40).sum())
                shown = slot in by_slot and by_slot[slot]["color"] == color
                assert (near > 150) == shown, (slot, color, near)


def test_a_codec_that_nobody_knows_is_refused() -> None:
    """Decoding it would end the process."""
    data = film(2, form="matroska").replace(b"V_MPEG4/ISO/ASP", b"V_ZZZZZ/ISO/ASP")
    with pytest.raises(BadImage, match="not known"):
        list(frames_of(data, LIMITS))


def test_a_telephone_held_upright_films_upright_pictures() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:16, :16] = 255  # top left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = buffer.getvalue()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)  # shown clockwise by 90
    at = data.index(plain, data.index(b"tkhd"))
    ((_, image),) = frames_of(data[:at] + turned + data[at + 36 :], LIMITS)
    assert image.size == (48, 64)
    shown = np.asarray(image.convert("L"))
    assert shown[:10, -10:].mean() > 200, "top right"
    assert shown[:10, :10].mean() < 50


def test_a_video_that_does_not_say_how_long_it_is_is_seen_whole() -> None:
    class Pipe(io.RawIOBase):
        """What is written to it cannot go back to fill in a length."""

        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

        def writable(self) -> bool:
            return True

    pipe = Pipe()
    with av.open(pipe, "w", format="matroska", options={"live": "1"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40 * 4):
            picture = np.full((48, 64, 3), number % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(io.BytesIO(bytes(pipe.data))) as opened:
        assert opened.duration is None
        assert opened.streams.video[0].duration is None
    times = [time for time, _ in frames_of(bytes(pipe.data), FrameLimits(4, 1.0, 10_000))]
    assert times == pytest.approx([0, 10, 20, 30], abs=0.5)


def test_frames_beyond_what_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caprl_async.data.video.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(BadImage, match="64 x 48"):
        list(frames_of(film(1), LIMITS))


def test_half_a_note_is_none_and_many_may_take_frames_at_once(tmp_path: Path) -> None:
    store, data = ImageStore(tmp_path / "store"), film(2)
    video = keep_video(store, data, LIMITS)
    (note,) = (tmp_path / "store" / "videos").iterdir()
    note.write_text("[[0.0, ")
    assert keep_video(store, data, LIMITS) == video
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            other = FrameLimits(2, 1.0, 5000 + number)
            found = list(pool.map(lambda _, limits=other: keep_video(store, data, limits), range(8)))
            assert len({one.sha256 for one in found}) == 1


@pytest.mark.parametrize("empty", [None, "", [], {"bytes": None, "path": None}])
def test_an_empty_column_is_none(tmp_path: Path, empty: Any) -> None:
    ((row, _),) = tiny_video.rows(1, "x")
    write_parquet([row], tmp_path / "a.parquet")
    (tmp_path / "v.mp4").write_bytes(film(1))
    record = {
        "id": "a",
        "image": empty,
        "images": empty,
        "videos": ["v.mp4"],
        "reward_model": row["reward_model"],
    }
    (found,) = read_record(record, "a", tmp_path, "unknown")
    assert isinstance(found, Row)
    assert (found.image, found.video) == (tmp_path / "v.mp4", True)
    sample = {"caption": "red .", "path": "v.mp4", "image": empty, "video": "v.mp4"}
    (tmp_path / "a.jsonl").write_text(json.dumps(sample))
    (example,) = read_examples(tmp_path / "a.jsonl")
    assert isinstance(example, Example)
    assert example.video
