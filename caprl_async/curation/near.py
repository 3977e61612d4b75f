"""Images that look alike: perceptual hashes, and which of them are within a few bits of each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from caprl_async.data.processor import read_image
from caprl_async.types import ImageData, ImageRef

BITS = 64


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of the image's coarse structure (pHash: signs of its low frequencies against their median)."""
    from imagehash import phash

    return int(str(phash(image)), 16)


def hash_of(image: ImageRef | ImageData) -> int:
    """The perceptual hash of an image that is still encoded.

    Raises:
        UnreadableImage: it cannot be read.
    """
    return perceptual_hash(read_image(image))


class Near:
    """A growing set of hashes that finds those within `distance` bits, exactly.

    A hash is cut into `distance` + 1 bands: two hashes that differ in at most `distance` bits have one band
    in common, so only hashes that share a band are compared.
    """

    def __init__(self, distance: int, hashes: Iterable[int] = ()) -> None:
        """
        Raises:
            ValueError: `distance` is not in 0..15; beyond, everything would be compared with everything.
        """
        if not 0 <= distance <= 15:
            raise ValueError(f"a distance of {distance} bits; 0 to 15 can be searched")
        self._distance = distance
        edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._bands]
        for value in hashes:
            self.add(value)

    def add(self, value: int) -> None:
        """Takes a hash in."""
        for bucket, (shift, mask) in zip(self._buckets, self._bands, strict=True):
            bucket[(value >> shift) & mask].append(value)

    def find(self, value: int) -> int | None:
        """A hash of the set within the distance, or None."""
        for candidate in self._candidates(value):
            if (candidate ^ value).bit_count() <= self._distance:
                return candidate
        return None

    def _candidates(self, value: int) -> Iterator[int]:
        for bucket, (shift, mask) in zip(self._buckets, self._bands, strict=True):
            found: Sequence[int] = bucket.get((value >> shift) & mask, ())
            yield from found
