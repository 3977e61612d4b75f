"""What a captioner is asked about each image, and what is kept of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from caprl_async.config import Config
from caprl_async.judge.permutations import seed_of
from caprl_async.stream.sources import image_of
from caprl_async.stream.stage import Row
from caprl_async.writer.types import Ask, Text
from caprl_async.writer.writer import model_name

CAPTIONS = "captions"
"""Name of the folder of captions in a run folder, and of its files."""


def about_captions(config: Config, captions: int) -> dict[str, Any]:
    """How the captions are made, so many of each image, for whoever finds them."""
    captioner = config.captioner
    return {
        "captioner": model_name(captioner),
        "prompt": config.data.prompt,
        "temperature": captioner.temperature,
        "max_tokens": captioner.max_tokens,
        "captions": captions,
        # A server has limits of its own.
        "min_pixels": None if captioner.endpoint.url else captioner.min_pixels,
        "max_pixels": None if captioner.endpoint.url else captioner.max_pixels,
        "seed": config.seed,
    }


@dataclass(frozen=True)
class Captioned:
    """What is asked about a row, and what becomes of the answers; sent to the actors."""

    prompt: str
    captions: int
    seed: int
    empty: bool = False  # whether an empty caption is one, rather than a failure

    def asks(self, row: Row) -> Sequence[Ask]:
        """
        Raises:
            OSError: the image's file cannot be read.
        """
        image = image_of(row)
        row["data"], row["sha256"] = image.data, image.sha256
        # The same captions whoever makes them, and when.
        seed = seed_of("annotate", self.seed, row["id"]) % 2**31
        return [Ask(self.prompt, image=image, n=self.captions, seed=seed)]

    def take(self, row: Row, answers: Sequence[tuple[Text, ...]]) -> Row:
        """
        Raises:
            ValueError: a caption is empty, and must not be.
        """
        (texts,) = answers
        if not self.empty and not all(text.text for text in texts):
            raise ValueError("the captioner wrote nothing")
        return {
            "prompt": self.prompt,
            "captions": [text.text for text in texts],
            "finish": [text.finish.value for text in texts],
            "tokens": [text.tokens for text in texts],
        }
