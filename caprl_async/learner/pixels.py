"""Pixels for training, checked against what the engine captioned, and kept while they are in use."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from caprl_async.data.processor import Grid, PixelInput, PolicyProcessor
from caprl_async.types import ImageRef


class PixelsDiffer(ValueError):
    """The learner would train on other pixels than the engine captioned; the message names both."""


class PixelCache:
    """Pixels by content hash, the least recently used forgotten beyond `limit_bytes`."""

    def __init__(self, source: PolicyProcessor, limit_bytes: int = 1 << 29) -> None:
        self._source = source
        self._limit = limit_bytes
        self._held: OrderedDict[str, PixelInput] = OrderedDict()
        self._bytes = 0

    def __call__(self, image: ImageRef, grid: Grid) -> Tensor:
        """Pixel values [patches, dim] of an image that the engine saw as `grid`.

        Raises:
            PixelsDiffer: the grid is not the engine's.
            UnreadableImage: the file is missing or its content has changed.
        """
        found = self._held.pop(image.sha256, None)
        if found is None:
            found = self._source.pixels(image)
            self._bytes += found.pixel_values.nbytes
        self._held[image.sha256] = found
        while self._bytes > self._limit and len(self._held) > 1:
            _, old = self._held.popitem(last=False)
            self._bytes -= old.pixel_values.nbytes
        if tuple(found.grid) != grid:
            raise PixelsDiffer(
                f"the engine saw image {image.path} as {grid} patches, the learner makes {tuple(found.grid)};"
                " both must use policy.min_pixels, policy.max_pixels and the same processor"
            )
        return found.pixel_values
