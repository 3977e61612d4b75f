"""Videos as frames: each a picture in the image store, with the second that it was taken at.

Frames stand at equal distances from the start on: `fps` of them a second, or as many as `frames` allows over
the whole length. They are taken out once; who reads a video later reads its frames.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from caprl_async.config import Config
from caprl_async.data.images import (
    MAX_ASPECT,
    MAX_BYTES,
    MAX_PIXELS,
    BadImage,
    ImageStore,
    stat_of,
    stored_path,
    write_whole,
)
from caprl_async.data.rows import DataError, Dataset, Row
from caprl_async.types import Frame, ImageRef

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,mpegts,mpeg,flv,ogg,gif"
"""Containers that hold their pictures themselves: playlists would have other files opened, or addresses."""

_OPTIONS = {"format_whitelist": _FORMATS}
_SEEK_S = 5.0  # a longer way to the next frame is jumped, a shorter one decoded
_EARLY_S = 1e-3  # times are rounded to the stream's ticks


@dataclass(frozen=True)
class FrameLimits:
    """How much of a video is kept."""

    frames: int  # at most
    fps: float
    max_pixels: int  # of a frame; larger ones are made smaller

    @classmethod
    def of(cls, config: Config) -> FrameLimits | None:
        """The conf's; None if it takes no videos."""
        data = config.data
        return cls(data.frames, data.fps, config.policy.max_pixels) if data.frames else None


def check_videos(data: Dataset, config: Config) -> None:
    """
    Raises:
        DataError: the data holds videos, and the conf takes none.
    """
    if not config.data.frames and any(row.video for row in data):
        raise DataError(f"{data.path} holds videos; data.frames says as how many frames each is shown")


def keep_row(store: ImageStore, row: Row, limits: FrameLimits | None) -> ImageRef:
    """The row's image, or the frames of its video, in the store; without limits no video is taken.

    Raises:
        BadImage: it cannot be read, or is a video that is not taken.
    """
    if not row.video:
        return store.put(row.image)
    if limits is None:
        raise BadImage("a video, where only images are taken")
    return keep_video(store, row.image, limits)


def keep_video(store: ImageStore, video: bytes | Path, limits: FrameLimits) -> ImageRef:
    """The frames of an encoded video (or of the file at a path), in the store; may be called twice.

    Raises:
        BadImage: it cannot be read or decoded.
    """
    note = store.folder / "videos" / f"{_identity(video, limits)}.json"
    known = _noted(note)
    if known and all(stored_path(store.folder, sha256).is_file() for _, sha256 in known):
        return _reference(store, known)
    found = [(round(time, 3), store.put(_encoded(image)).sha256) for time, image in frames_of(video, limits)]
    write_whole(note, json.dumps(found).encode())
    return _reference(store, found)


def _noted(note: Path) -> list[tuple[float, str]]:
    """What was found of a video before; nothing if there is no note, or half of one."""
    try:
        return [(float(time), str(sha256)) for time, sha256 in json.loads(note.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _identity(video: bytes | Path, limits: FrameLimits) -> str:
    digest = hashlib.sha256(json.dumps(asdict(limits)).encode())
    if isinstance(video, bytes):
        digest.update(video)
    else:
        state = stat_of(video)
        digest.update(f"{video.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _reference(store: ImageStore, found: Sequence[tuple[float, str]]) -> ImageRef:
    frames = tuple(
        Frame(sha256=sha256, path=str(stored_path(store.folder, sha256)), time=time) for time, sha256 in found
    )
    every = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return ImageRef(sha256=every, path=frames[0].path, frames=frames)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    except OSError as error:  # of more than 65,500 px
        raise BadImage(f"a frame of {image.width} x {image.height} px: {error}") from error
    return buffer.getvalue()


def frame_times(duration: float, limits: FrameLimits) -> list[float]:
    """Seconds of the frames that are taken of a video of `duration` seconds; the first is 0."""
    count = max(1, min(limits.frames, math.ceil(duration * limits.fps)))
    return [duration * k / count for k in range(count)]


def frames_of(video: bytes | Path, limits: FrameLimits) -> Iterator[tuple[float, Image.Image]]:
    """(second, RGB picture) of the frames; fewer than `frame_times` where the video has fewer.

    Raises:
        BadImage: it is no video of a known form, is damaged, or has no pictures.
    """
    import av

    name = "a video" if isinstance(video, bytes) else str(video)
    try:
        duration = _duration(video, name)
        with av.open(_source(video), options=_OPTIONS) as container:
            stream = _stream(container, name)
            stream.thread_type = "AUTO"
            count = 0
            for time, frame in _taken(container, stream, frame_times(duration, limits)):
                _check_size(frame.width, frame.height, name)
                count += 1
                yield time, _picture(frame, limits.max_pixels)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"{name}: not a readable video: {error}") from error
    if not count:
        raise BadImage(f"{name}: no frame of it can be decoded")


def _source(video: bytes | Path) -> Any:
    """What PyAV opens: a relative name with a colon would be an address."""
    if isinstance(video, bytes):
        return io.BytesIO(video)
    path = video.resolve()
    if path.stat().st_size > MAX_BYTES:
        raise BadImage(f"{video}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    return str(path)


def _stream(container: Any, name: str) -> Any:
    """The pictures.

    Raises:
        BadImage: there are none, or none that can be decoded or held.
    """
    if not container.streams.video:
        raise BadImage(f"{name} has no pictures")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # decoding it would end the process
        raise BadImage(f"{name} is written in a way that is not known")
    _check_size(stream.width, stream.height, name)
    return stream


def _check_size(width: int, height: int, name: str) -> None:
    longer, shorter = max(width, height), min(width, height)
    if not 0 < longer * shorter <= MAX_PIXELS or longer > MAX_ASPECT * shorter:
        raise BadImage(f"{name}: frames of {width} x {height} px")


def _duration(video: bytes | Path, name: str) -> float:
    """Seconds; where the file does not say, up to the last picture's time."""
    import av

    with av.open(_source(video), options=_OPTIONS) as container:
        stream = _stream(container, name)
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1e6
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        if not times:
            raise BadImage(f"{name} has no times")
        return float((max(times) - min(times)) * stream.time_base)


def _taken(container: Any, stream: Any, times: Sequence[float]) -> Iterator[tuple[float, Any]]:
    """The first frame at or after each time, once; jumps over what lies far between."""
    start = float((stream.start_time or 0) * stream.time_base)
    wanted = 0
    while wanted < len(times):
        jumped = False
        for number, frame in enumerate(container.decode(stream)):
            rate = float(stream.average_rate or 1)
            time = number / rate if frame.time is None else frame.time - start
            if time + _EARLY_S < times[wanted]:
                continue
            while wanted < len(times) and time + _EARLY_S >= times[wanted]:
                wanted += 1
            yield max(0.0, time), frame
            if wanted == len(times):
                return
            if frame.time is not None and times[wanted] - time > _SEEK_S:
                container.seek(int((start + times[wanted]) / stream.time_base), stream=stream)
                jumped = True
                break
        if not jumped:
            return


def _picture(frame: Any, max_pixels: int) -> Image.Image:
    image: Image.Image = frame.to_image()
    if frame.rotation:  # as telephones write what they hold upright
        image = image.rotate(frame.rotation, expand=True)
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return image
