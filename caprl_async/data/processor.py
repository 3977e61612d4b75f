"""One processor for rollout, learner and evaluation, so that all of them see the same pixels and vocabulary.

The rollout's vLLM loads the same checkpoint's processor with the same `pixel_size`; the tests hold both to
the same grids and pixel values. Importing this module loads neither transformers nor torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_async.data.images import BadImage, decode, open_checked
from caprl_async.types import ImageData, ImageRef

if TYPE_CHECKING:
    import torch
    from PIL import Image

Grid = tuple[int, int, int]  # (t, h, w) in patches, before merging


class UnreadableImage(ValueError):
    """The file of an image is missing, is not an image, or is not the one its hash names."""


class UnsupportedModel(ValueError):
    """The checkpoint's processor is not of the family that this project feeds (Qwen2-VL and later)."""


@dataclass(frozen=True)
class PixelInput:
    """What the vision tower takes for one image."""

    pixel_values: torch.Tensor  # [t * h * w, channels * temporal_patch * patch * patch], float32
    grid: Grid


def read_image(image: ImageRef | ImageData) -> Image.Image:
    """The decoded RGB image.

    Raises:
        UnreadableImage: missing, damaged, or changed since its hash was taken.
    """
    if isinstance(image, ImageData):
        encoded, name = image.data, f"image {image.sha256[:12]}"
    else:
        encoded, name = _read(image), image.path
    try:
        return decode(encoded, name)
    except BadImage as error:
        raise UnreadableImage(f"not a readable image: {error}") from error


def _read(image: ImageRef) -> bytes:
    try:
        encoded = Path(image.path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot read image {image.path}: {error.strerror}") from error
    found = hashlib.sha256(encoded).hexdigest()
    if found != image.sha256:
        raise UnreadableImage(
            f"image {image.path} has sha256 {found}, expected {image.sha256}: write it again"
        )
    return encoded


def read_size(image: ImageRef) -> tuple[int, int]:
    """Width and height in px, from the file's header alone.

    Raises:
        UnreadableImage: the file is missing or is not an image.
    """
    try:
        with open_checked(image.path) as opened:
            return opened.size
    except Exception as error:  # what PIL raises at a broken header is anything
        raise UnreadableImage(f"cannot read image {image.path}: {error}") from error


def timestamp(seconds: float) -> str:
    """A time within a video, as captions are to write it: [mm:ss]."""
    return f"[{int(seconds) // 60:02d}:{int(seconds) % 60:02d}]"


def pixel_size(min_pixels: int, max_pixels: int) -> dict[str, int]:
    """The caps as the image processor's `size` (Qwen calls areas edges); vLLM is given the same."""
    return {"shortest_edge": min_pixels, "longest_edge": max_pixels}


class PolicyProcessor:
    """Tokenizer, chat template and image processor of one policy checkpoint under one pair of pixel caps."""

    def __init__(self, model: str, min_pixels: int, max_pixels: int) -> None:
        """Loads the processor files of the checkpoint folder `model`; no weights are read.

        Raises:
            UnsupportedModel: no image placeholder, grid or end token can be found in the checkpoint.
        """
        from transformers import AutoConfig, AutoProcessor

        config = AutoConfig.from_pretrained(model)
        processor: Any = AutoProcessor.from_pretrained(model)
        self._images: Any = getattr(processor, "image_processor", None)
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        placeholder = getattr(config, "image_token_id", None)
        if placeholder is None or not hasattr(self._images, "merge_size"):
            raise UnsupportedModel(
                f"{model}: need image_token_id in config.json and an image processor with merge_size; "
                "use a checkpoint of a Qwen-VL model"
            )
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise UnsupportedModel(f"{model}: the tokenizer names no eos_token")
        self._processor = processor
        self._grids: dict[tuple[int, int], Grid] = {}
        self._size = pixel_size(min_pixels, max_pixels)
        self.model = model
        self.image_token_id: int = placeholder
        self.eos_token_id: int = end
        self.vocab_size: int = config.get_text_config().vocab_size  # columns of the logits
        self.banned_token_ids: tuple[int, ...] = self._banned()
        self._never = frozenset((*self.banned_token_ids, self.eos_token_id))

    def _banned(self) -> tuple[int, ...]:
        """Ids a caption may not hold: special and added tokens but the end, and ids that name no token."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        nameless = set(range(self.vocab_size)) - set(self.tokenizer.get_vocab().values())
        banned = (special | nameless | {self.image_token_id}) - {self.eos_token_id}
        return tuple(sorted(i for i in banned if i < self.vocab_size))

    def prompt_ids(self, text: str, times: tuple[float, ...] = ()) -> tuple[int, ...]:
        """Token ids of one user turn (image, then `text`) up to the answer; placeholders are not expanded.

        With `times` a picture for each, behind its time: the frames of a video.

        Raises:
            UnsupportedModel: that does not give exactly one placeholder for each picture.
        """
        rendered = self.render(text, times)
        ids = tuple(self.tokenizer.encode(rendered, add_special_tokens=False))
        if ids.count(self.image_token_id) != max(1, len(times)) or text not in rendered:
            raise UnsupportedModel(
                f"{self.model}: its chat template must show each picture and the text of a user turn once, "
                f"but gave {rendered!r}"
            )
        return ids

    def answer_ids(self, text: str) -> tuple[int, ...] | None:
        """Token ids of an answer with its end, as a caption that is to be learnt has them.

        Spelled-out control tokens are plain text. None if the vocabulary has no words for it.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return (*ids, self.eos_token_id) if self._never.isdisjoint(ids) else None

    @property
    def fingerprint(self) -> str:
        """Of what turns texts and images into what the model takes."""
        return f"{self.model} {self._size} {self.vocab_size}"

    def render(self, text: str, times: tuple[float, ...] = ()) -> str:
        """One user turn up to the answer, as the chat template writes it; see `prompt_ids`."""
        image = {"type": "image"}
        frames = [part for time in times for part in ({"type": "text", "text": timestamp(time)}, image)]
        turn = {"role": "user", "content": [*(frames or [image]), {"type": "text", "text": text}]}
        rendered: str = self._processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=False
        )
        return rendered

    def grid(self, width: int, height: int) -> Grid:
        """Patches of an image of `width` x `height` px after resizing under the caps.

        Raises:
            UnreadableImage: the image is too elongated for the model.
        """
        if (width, height) not in self._grids:
            import torch

            blank = torch.zeros((3, height, width), dtype=torch.uint8)
            self._grids[width, height] = self._process(blank, f"an image of {width} x {height} px").grid
        return self._grids[width, height]

    def pixels(self, image: ImageRef) -> PixelInput:
        """What the vision tower takes for this image, equal to what the rollout's engine computes from it.

        Raises:
            UnreadableImage: see `read_image`; or too elongated for the model.
        """
        return self._process(read_image(image), image.path)

    def expanded(self, prompt: tuple[int, ...], grids: Sequence[Grid]) -> tuple[int, ...]:
        """A prompt with a placeholder for each picture, as the model takes it: one for each visual token."""
        found: list[int] = []
        of_next = iter(grids)
        for token in prompt:
            times = self.image_tokens(next(of_next)) if token == self.image_token_id else 1
            found += [token] * times
        return tuple(found)

    def image_tokens(self, grid: Grid) -> int:
        """Placeholders that one image of `grid` takes in the expanded prompt."""
        t, h, w = grid
        merge: int = self._images.merge_size
        return t * h * w // merge**2

    def _process(self, image: Any, name: str) -> PixelInput:
        try:
            out = self._images(images=[image], size=self._size, return_tensors="pt")
        except ValueError as error:
            raise UnreadableImage(f"{name}: {error}") from error
        t, h, w = (int(x) for x in out["image_grid_thw"][0])
        return PixelInput(out["pixel_values"], (t, h, w))
