"""Captions, and what can be said of them without asking anybody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TypeAlias

import numpy as np

from caprl_async.benchmarks.items import Item
from caprl_async.judge.monitors import SIGNS, signs_of, stems_of
from caprl_async.stream.captions import Caption

Captions: TypeAlias = Mapping[str, Sequence[Caption]]
"""By the SHA-256 of the image (or, made elsewhere, the question's id)."""


def captions_of(item: Item, captions: Captions) -> list[tuple[str, Sequence[Caption]]]:
    """Of each of the item's images: the key by which its captions are found, and them."""
    return [
        (key, captions.get(key, ()))
        for image in item.images
        for key in [item.item_id if not captions.get(image.sha256) else image.sha256]
    ]


def measures(captions: Captions, items: Sequence[Item]) -> dict[str, float | None]:
    """Lengths in words, the share that was cut, and the signs of reward hacking (docs/judge.md): means over
    the captions of what the items ask about."""
    asked: dict[str, list[str]] = defaultdict(list)
    for item in items:
        for key, _ in captions_of(item, captions):
            asked[key].append(item.question)
    every = [(key, caption) for key in asked for caption in captions.get(key, ())]
    signs = [signs_of(caption.text, bool(caption.truncated), stems_of(asked[key])) for key, caption in every]
    words = [len(caption.text.split()) for _, caption in every]
    means = {
        name.removeprefix("hack_"): fmean(one[name] for one in signs) if signs else None for name in SIGNS
    }
    if all(caption.truncated is None for _, caption in every):
        means["truncated"] = None
    return {
        "captions": len(every),
        "words_mean": fmean(words) if words else None,
        "words_median": median(words) if words else None,
        "words_95th": float(np.quantile(words, 0.95)) if words else None,
        **means,
    }
