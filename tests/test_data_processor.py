"""The one processor: prompts, bans, grids, and images that are not what they claim to be."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engine_kit import MAX_PIXELS, MIN_PIXELS, PROMPT, noise_image, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_async.data.processor import PolicyProcessor, UnreadableImage, UnsupportedModel, read_image
from caprl_async.types import ImageRef


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PolicyProcessor:
    return PolicyProcessor(tiny_model("policy", tmp_path_factory.mktemp("model")), MIN_PIXELS, MAX_PIXELS)


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import caprl_async.data.processor, sys;"
        "print([m for m in ('vllm', 'ray', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prompt_has_one_placeholder_and_ends_where_the_answer_begins(processor: PolicyProcessor) -> None:
    ids = processor.prompt_ids(PROMPT)
    assert ids.count(processor.image_token_id) == 1
    assert ids[-1] != processor.eos_token_id
    assert "assistant" in processor.tokenizer.decode(ids[-3:])
    words = processor.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert any(list(ids[i : i + len(words)]) == words for i in range(len(ids)))


def test_frames_stand_behind_their_times(processor: PolicyProcessor) -> None:
    rendered = processor.render(PROMPT, (0.0, 9.96, 75.0))
    marks = [rendered.index(mark) for mark in ("[00:00]", "[00:09]", "[01:15]", PROMPT)]
    pictures = [m.start() for m in re.finditer(re.escape("<|image_pad|>"), rendered)]
    assert (
        sorted(marks + pictures)
        == [x for pair in zip(marks, [*pictures, 10**9], strict=True) for x in pair][:-1]
    )
    ids = processor.prompt_ids(PROMPT, (0.0, 9.96, 75.0))
    grids = [(1, 4, 4), (1, 8, 4), (1, 4, 8)]
    expanded = processor.expanded(ids, grids)
    assert expanded.count(processor.image_token_id) == 4 + 8 + 8
    assert [i for i in expanded if i != processor.image_token_id] == [
        i for i in ids if i != processor.image_token_id
    ]


def test_a_text_that_spells_the_placeholder_is_refused(processor: PolicyProcessor) -> None:
    with pytest.raises(UnsupportedModel, match="each picture"):
        processor.prompt_ids("describe <|image_pad|> .")


def test_all_special_tokens_but_the_end_are_banned(processor: PolicyProcessor) -> None:
    banned = set(processor.banned_token_ids)
    assert processor.image_token_id in banned
    assert processor.eos_token_id not in banned
    assert set(processor.tokenizer.all_special_ids) - banned <= {processor.eos_token_id}
    assert not banned & set(processor.tokenizer.encode(PROMPT, add_special_tokens=False))
    assert max(banned) < processor.vocab_size


@settings(max_examples=40)
@given(width=st.integers(8, 900), height=st.integers(8, 900))
def test_grid_stays_under_the_caps_and_fits_the_merge(
    processor: PolicyProcessor, width: int, height: int
) -> None:
    t, h, w = processor.grid(width, height)
    patch, merge = 14, 2
    assert t == 1
    assert h % merge == 0
    assert w % merge == 0
    area = h * w * patch**2
    # One row or column of merged patches is the least, so a very long image may leave the range.
    if min(h, w) > merge:
        assert MIN_PIXELS <= area <= MAX_PIXELS
    assert processor.image_tokens((t, h, w)) == h * w // merge**2


def test_pixels_have_the_grid_of_their_size(processor: PolicyProcessor, tmp_path: Path) -> None:
    found = processor.pixels(noise_image(tmp_path, 131, 77))
    assert found.grid == processor.grid(131, 77)
    assert found.pixel_values.shape == (found.grid[1] * found.grid[2], 3 * 2 * 14 * 14)


def test_unreadable_images_are_named(processor: PolicyProcessor, tmp_path: Path) -> None:
    good = noise_image(tmp_path, 40, 40)
    with pytest.raises(UnreadableImage, match=r"missing\.png"):
        read_image(ImageRef(sha256=good.sha256, path=str(tmp_path / "missing.png")))
    with pytest.raises(UnreadableImage, match="sha256"):
        read_image(ImageRef(sha256="0" * 64, path=good.path))
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(good.path).read_bytes()[:200])
    with pytest.raises(UnreadableImage, match="not a readable image"):
        processor.pixels(ImageRef(sha256=hashlib.sha256(cut.read_bytes()).hexdigest(), path=str(cut)))
    with pytest.raises(UnreadableImage, match="aspect ratio"):
        processor.grid(2, 1000)


def test_a_text_only_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="image_token_id"):
        PolicyProcessor(tiny_model("judge", tmp_path), MIN_PIXELS, MAX_PIXELS)
