"""Captions, and what can be said of them without asking anybody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeAlias

import numpy as np

from caprl_async.benchmarks.items import Item
from caprl_async.judge.monitors import SIGNS, signs_of, stems_of


@dataclass(frozen=True)
class Caption:
    """One caption; whether it was cut at a limit is not known of those made elsewhere."""

    text: str
    truncated: bool | None = None


Captions: TypeAlias = Mapping[str, Sequence[Caption]]
"""By the SHA-256 of the image (or, made elsewhere, the question's id)."""


def measures(captions: Captions, items: Sequence[Item]) -> dict[str, float | None]:
    """Lengths in words, the share that was cut, and the signs of reward hacking (docs/judge.md), as means."""
    asked: dict[str, list[str]] = defaultdict(list)
    for item in items:
        for image in item.images:
            asked[image.sha256].append(item.question)
    every = [(key, caption) for key, own in captions.items() for caption in own]
    signs = [
        signs_of(caption.text, bool(caption.truncated), stems_of(asked.get(key, ())))
        for key, caption in every
    ]
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
