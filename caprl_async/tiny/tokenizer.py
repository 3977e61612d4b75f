"""A word-level tokenizer with Qwen's special tokens and chat template, and its processor."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_async.tiny import grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
UNSEEN = "<unk>"
PATCH, MERGE = 14, 2  # px per patch; patches per side of one visual token

_PUNCTUATION = [".", ":", ",", "?", "(", ")", "\n"]
_LETTERS = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
# Words of roles, prompts and templates that no grammar holds; a few spare ones for a user's own prompt.
_PROMPT_TEXT = (
    "system user assistant describe read image this all picture caption question options option "
    "answer answers the is are a an and or in of on to from with not no yes only use please below above "
    "say see look detail short long more each every one"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def vocabulary(more: Sequence[str] = ()) -> dict[str, int]:
    """Every token and its id, special tokens first, `more` last."""
    words = [*SPECIAL_TOKENS, UNSEEN, *_PUNCTUATION, *_LETTERS, *_PROMPT_TEXT.split(), *grammar.all_words()]
    words += more
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer: words split at white space, punctuation and line breaks their own tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(more), unk_token=UNSEEN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\n.:,?()]"), "isolated"),
            pre_tokenizers.Split(Regex(r"[ \t\r]+"), "removed"),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=UNSEEN,
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer in the Hugging Face layout."""
    build_tokenizer().save_pretrained(folder)


def save_processor(folder: Path, more: Sequence[str] = ()) -> None:
    """Writes the tokenizer, with `more` words, and the image processor; 112 px stay 112 px: 64 patches, 16
    visual tokens."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    side = 112
    size = {"shortest_edge": (2 * PATCH * MERGE) ** 2, "longest_edge": side * side}
    shared: dict[str, Any] = {
        "size": size,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=build_tokenizer(more),
        video_processor=Qwen2VLVideoProcessor(**shared),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The shared instance, loaded the way a user's process loads it: from files."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        return PreTrainedTokenizerFast.from_pretrained(folder)
