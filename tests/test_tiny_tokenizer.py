"""The tiny tokenizer and processor: words round-trip, special tokens are special, 112 px stay 112 px."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.tiny import grammar
from caprl_async.tiny.models import MODELS
from caprl_async.tiny.pretrain import caption_for, pixels_of, positions, prompt_ids
from caprl_async.tiny.tokenizer import SPECIAL_TOKENS, save_processor, tokenizer, vocabulary
from caprl_async.tiny.world import POLICY_PROMPT, pick_asks, sample_world


@given(st.lists(st.sampled_from([*grammar.all_words(), ".", ":", "?", ")", "A", "Z"]), max_size=30))
def test_words_round_trip(words: list[str]) -> None:
    text = " ".join(words)
    assert tokenizer().decode(tokenizer()(text).input_ids) == text


def test_line_breaks_and_punctuation_are_tokens_of_their_own() -> None:
    assert tokenizer().tokenize("caption : red.\nA) blue  B) two?") == [
        *("caption", ":", "red", ".", "\n"),
        *("A", ")", "blue", "B", ")", "two", "?"),
    ]


def test_special_tokens() -> None:
    words = tokenizer()
    assert words.eos_token == "<|im_end|>"
    assert words.pad_token == "<|endoftext|>"
    ids = words("".join(SPECIAL_TOKENS)).input_ids
    assert ids == [vocabulary()[token] for token in SPECIAL_TOKENS]
    assert set(ids) <= set(words.all_special_ids)
    assert words.decode(ids, skip_special_tokens=True) == ""
    assert len(words) == len(vocabulary())


def test_every_caption_and_question_is_known() -> None:
    rng = random.Random(0)
    words = tokenizer()
    for _ in range(300):
        world = sample_world(rng)
        texts = [caption_for(kind, world, rng) for kind in ("sparse", "dense")]
        texts += [grammar.dense_caption(world.entities, form) for form in (grammar.JUDGE, grammar.HELDOUT)]
        for phrasing in ("key", grammar.JUDGE, grammar.HELDOUT):
            texts += [grammar.question(ask, phrasing) for ask in pick_asks(world, rng)]
        for text in texts:
            assert words.decode(words(text).input_ids) == text
            assert words.unk_token_id not in words(text).input_ids


def test_chat_template() -> None:
    words = tokenizer()
    image = [{"type": "image"}, {"type": "text", "text": "describe the image ."}]
    messages = [{"role": "system", "content": "look"}, {"role": "user", "content": image}]
    assert words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nlook<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "describe the image .<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = words.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert plain == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize("saved", ["fresh", "committed"])
def test_processor_agrees_with_training(tmp_path: Path, saved: str) -> None:
    """What the policy was trained on is what a user's processor gives it: ids, patches and positions."""
    from transformers import AutoProcessor

    if saved == "fresh":
        save_processor(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path if saved == "fresh" else MODELS / "policy")
    images = [sample_world(random.Random(seed)).image() for seed in range(3)]
    content = [{"type": "image"}, {"type": "text", "text": POLICY_PROMPT}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    batch = processor(text=[text] * 3, images=images, return_tensors="pt")
    assert batch["input_ids"].tolist() == [prompt_ids(POLICY_PROMPT)] * 3
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8]] * 3
    torch.testing.assert_close(batch["pixel_values"], pixels_of(images), atol=1e-5, rtol=0)
    assert positions(prompt_ids(POLICY_PROMPT), 40).shape == (3, 40)
