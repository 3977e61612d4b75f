"""A chat template's user turn as token ids, in which data cannot act as markup."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_MARKUP = re.compile(r"[<\[](?=\S)|\](?=~)")
_SENTINEL = "CAPRLCONTENT"  # stands for the user's text while the chat template is taken apart


class NoChatTemplate(ValueError):
    """The tokenizer has no chat template that shows one user turn."""


class ChatEncoder:
    """`opening`, then `plain_ids` of any texts, then `closing`: ids of a user turn up to the answer.

    Only the template's own text is encoded with special tokens. All other text is plain: control tokens
    spelled out in it become ordinary characters.
    """

    def __init__(self, tokenizer: Any, render: Callable[[str], str] | None = None) -> None:
        """`render` writes out a user turn with a given text; without it, the tokenizer's template does.

        Raises:
            NoChatTemplate: see the class.
        """
        self._tokenizer = tokenizer
        added: dict[str, int] = dict(tokenizer.get_added_vocab())
        harmless = {tokenizer.unk_token_id}  # what a word-level vocabulary makes of any unseen word
        self._control_ids = ({*added.values(), *tokenizer.all_special_ids}) - harmless
        names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, names))) if names else None
        opening, closing = _scaffold(tokenizer, render)
        self.opening = tuple(self._encode(opening, plain=False)) if opening else ()
        self.closing = tuple(self._encode(closing, plain=False)) if closing else ()

    def ids(self, text: str) -> tuple[int, ...]:
        """A whole turn that says `text`."""
        return (*self.opening, *self.plain_ids(text), *self.closing)

    def plain_ids(self, text: str) -> list[int]:
        """Encodes data: no id in the result opens or closes anything, whatever the text spells."""
        ids = [token for piece in self._pieces(text) for token in self._encode(piece, plain=True)]
        return [token for token in ids if token not in self._control_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a generated answer up to its first control token, which ends it."""
        end = next((i for i, token in enumerate(ids) if token in self._control_ids), len(ids))
        text: str = self._tokenizer.decode(list(ids[:end]))
        return text

    def _pieces(self, text: str) -> list[str]:
        """Cuts `text` so that no piece holds the spelling of a control token.

        Splitting special tokens is not enough: added tokens that are not marked special (`<think>`) and
        entries of a word-level vocabulary are matched nevertheless.
        """
        if self._control_text is None:
            return [text]
        pieces, start = [], 0
        for match in self._control_text.finditer(text):
            pieces += [text[start : match.start()], *match.group()]
            start = match.end()
        pieces.append(text[start:])
        return [piece for piece in pieces if piece]

    def _encode(self, text: str, plain: bool) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain, return_attention_mask=False
        )["input_ids"]
        return ids


def _scaffold(tokenizer: Any, render: Callable[[str], str] | None) -> tuple[str, str]:
    """The chat template's text before and after one user message, up to where the assistant begins."""
    if render is None:
        if not getattr(tokenizer, "chat_template", None):
            raise NoChatTemplate("the tokenizer has no chat template; take an instruction-tuned checkpoint")
        message = [{"role": "user", "content": _SENTINEL}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        text = render(_SENTINEL)
    opening, found, closing = text.partition(_SENTINEL)
    if not found or _SENTINEL in closing:
        raise NoChatTemplate("the chat template does not show a user message exactly once")
    return opening, closing


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer as its files say.

    `AutoTokenizer` overrules a checkpoint of type qwen2 that declares a plain `tokenizer.json` and builds
    Qwen's byte-level one from its vocabulary instead, which reads every text as garbage.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    described = Path(folder) / "tokenizer_config.json"
    declared = json.loads(described.read_text()).get("tokenizer_class") if described.is_file() else None
    plain = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(folder)


def escape_markup(text: str) -> str:
    """Puts a space into what the control tokens of chat models begin with: `<|im_end|>`, `[/INST]`, `]~b]`.

    That is behind each `<` and `[` before a non-space; their wide and small forms, of which some tokenizers
    make the plain ones, become plain first, and what cannot be seen is taken out. The text stays readable,
    and escaping it again changes nothing.
    """
    return _MARKUP.sub(lambda match: match[0] + " ", without_disguise(text, "<>[]"))


def without_disguise(text: str, signs: str) -> str:
    """The text with each character that may be read as one of `signs` (wide, small forms) as that one.

    Control and format characters go, since a tokenizer that drops them would join what they part; new lines
    and tabs stay.
    """
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(plain if (plain := unicodedata.normalize("NFKC", c)) in signs else c for c in kept)
