"""Which rows an output has already: a set of ids that costs 16 bytes each, so that millions fit anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class Done:
    """Membership by 128-bit digests of the ids; immutable, and cheap to send to other processes."""

    def __init__(self, ids: Iterable[str]) -> None:
        digests = np.frombuffer(b"".join(map(digest_of, ids)), dtype=np.uint64).reshape(-1, 2)
        order = np.argsort(digests[:, 0], kind="stable")
        self._high: NDArray[np.uint64] = digests[order, 0]
        self._low: NDArray[np.uint64] = digests[order, 1]

    def __len__(self) -> int:
        return len(self._high)

    def has(self, ids: Iterable[str]) -> NDArray[np.bool_]:
        """Of each id, whether it is in the set."""
        asked = np.frombuffer(b"".join(map(digest_of, ids)), dtype=np.uint64).reshape(-1, 2)
        first = np.searchsorted(self._high, asked[:, 0], "left")
        last = np.searchsorted(self._high, asked[:, 0], "right")
        found = np.zeros(len(asked), dtype=np.bool_)
        for row in np.flatnonzero(last > first):
            found[row] = asked[row, 1] in self._low[first[row] : last[row]]
        return found


def digest_of(text: str) -> bytes:
    """16 bytes that stand for an id."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
