"""Pixels for training, checked against what the engine captioned, and kept while they are in use."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from caprl_async.data.processor import PixelInput, PolicyProcessor
from caprl_async.learner.batch import TrainSequence


class PixelsDiffer(ValueError):
    """The learner would train on other pixels than the engine captioned; the message names both."""


class PixelCache:
    """Pixels by content hash, the least recently used forgotten beyond `limit_bytes`."""

    def __init__(self, source: PolicyProcessor, limit_bytes: int = 1 << 29) -> None:
        self._source = source
        self._limit = limit_bytes
        self._held: OrderedDict[str, PixelInput] = OrderedDict()
        self._bytes = 0

    def __call__(self, sequence: TrainSequence) -> Tensor:
        """Pixel values [patches, dim] of the sequence's image.

        Raises:
            PixelsDiffer: the grid is not the engine's.
            UnreadableImage: the file is missing or its content has changed.
        """
        key = sequence.image.sha256
        found = self._held.pop(key, None)
        if found is None:
            found = self._source.pixels(sequence.image)
            self._bytes += found.pixel_values.nbytes
        self._held[key] = found
        while self._bytes > self._limit and len(self._held) > 1:
            _, old = self._held.popitem(last=False)
            self._bytes -= old.pixel_values.nbytes
        if tuple(found.grid) != sequence.grid:
            raise PixelsDiffer(
                f"{sequence.name}: the engine saw image {sequence.image.path} as {sequence.grid} patches, "
                f"the learner makes {tuple(found.grid)}; both must use policy.min_pixels, policy.max_pixels "
                "and the same processor"
            )
        return found.pixel_values
