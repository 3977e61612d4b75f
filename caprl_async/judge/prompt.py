"""Turns captions and questions into the judge's token ids; nothing in them can act as markup."""

from __future__ import annotations

import functools
import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_async.config import JudgePromptConfig

LETTERS = string.ascii_uppercase
ALWAYS = {"caption": ("caption",), "question": ("question",)}
"""The placeholders of each template of `judge.prompt` in every mode."""
WITH_LETTERS = {"question": ("options",), "option": ("letter", "text")}
"""The further ones where options are shown with letters."""

_SENTINEL = "CAPRLCONTENT"  # stands for the user's message while the chat template is taken apart


class PromptError(ValueError):
    """The judge's tokenizer and `judge.prompt` do not fit together."""


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


class JudgePrompter:
    """Builds prompts of one judge: chat opening, instruction, caption | question, options, closing, prefill.

    The prompt of a question is `head(caption) + tail(stem, options)`; the head is the same for all questions
    of a caption, so an engine with prefix caching computes it once. Only the chat template's own text is
    encoded with special tokens. All other text is plain: control tokens spelled out in it become ordinary
    characters, the caption cannot contain the marks of its block, and stems and options are single lines.
    """

    def __init__(self, tokenizer: Any, config: JudgePromptConfig) -> None:
        """`tokenizer` is a transformers tokenizer with a chat template.

        Raises:
            PromptError: no usable chat template, or a placeholder is missing in `config`.
        """
        check_placeholders(config, ALWAYS)
        self._tokenizer = tokenizer
        self._config = config
        self._space = " " if config.answer_space else ""
        added: dict[str, int] = dict(tokenizer.get_added_vocab())
        harmless = {tokenizer.unk_token_id}  # what a word-level vocabulary makes of any unseen word
        self._control_ids = ({*added.values(), *tokenizer.all_special_ids}) - harmless
        names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, names))) if names else None
        opening, closing = _chat_scaffold(tokenizer)
        self._opening = self._scaffold_ids(opening)
        self._prefill = self.plain_ids(config.prefill)
        self._closing = (*self._scaffold_ids(closing), *self._prefill)
        self._head = functools.lru_cache(4096)(self._encode_head)
        self._tail = functools.lru_cache(65536)(self._encode_tail)
        self._option = functools.lru_cache(65536)(self._encode_option)

    def head(self, caption: str) -> list[int]:
        """Ids of everything up to the end of the caption block."""
        return list(self._head(caption))

    def tail(self, stem: str, options: Sequence[str] | None) -> list[int]:
        """Ids from the question to the prefill; options get letters in the order given, None shows none.

        Raises:
            PromptError: more options than letters.
        """
        return list(self._tail(stem, None if options is None else tuple(options)))

    def letter_ids(self, n: int) -> tuple[int, ...]:
        """The token of each of the first `n` option letters, as the first token of the answer.

        Raises:
            PromptError: more than 26, a letter is not one token that no other letter has, or the templates
                do not show options with letters.
        """
        check_placeholders(self._config, WITH_LETTERS)
        if n > len(LETTERS):
            raise PromptError(f"{n} options, but only {len(LETTERS)} letters")
        ids = [self._letter_id(letter) for letter in LETTERS[:n]]
        if len(set(ids)) < n:
            raise PromptError(f"option letters {LETTERS[:n]} share tokens {ids}; use judge.mode=likelihood")
        return tuple(ids)

    def option_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of an option's text as the answer; may hold the unknown-word token, see `knows`."""
        return self._option(text)

    def knows(self, ids: Sequence[int]) -> bool:
        """True if no token is the unknown-word token."""
        unknown = self._tokenizer.unk_token_id
        return unknown is None or unknown not in ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a generated answer up to its first control token, which ends it."""
        end = next((i for i, token in enumerate(ids) if token in self._control_ids), len(ids))
        text: str = self._tokenizer.decode(list(ids[:end]))
        return text

    def plain_ids(self, text: str) -> list[int]:
        """Encodes data: no id in the result opens or closes anything, whatever the text spells."""
        ids = [token for piece in self._pieces(text) for token in self._encode(piece, plain=True)]
        return [token for token in ids if token not in self._control_ids]

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

    def _scaffold_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(text, plain=False)) if text else ()

    def _encode_head(self, caption: str) -> tuple[int, ...]:
        return (*self._opening, *self.plain_ids(head_text(caption, self._config)))

    def _encode_tail(self, stem: str, options: tuple[str, ...] | None) -> tuple[int, ...]:
        return (*self.plain_ids(tail_text(stem, options, self._config)), *self._closing)

    def _encode_option(self, text: str) -> tuple[int, ...]:
        return tuple(self.plain_ids(self._space + one_line(text)))

    def _letter_id(self, letter: str) -> int:
        ids = self.plain_ids(self._space + letter)
        if len(ids) != 1 or not self.knows(ids):
            raise PromptError(
                f"option letter {self._space + letter!r} is not one token of the judge but {ids}; "
                "set judge.prompt.answer_space the other way or use judge.mode=likelihood"
            )
        return ids[0]


def head_text(caption: str, config: JudgePromptConfig) -> str:
    """The user message up to the end of the caption block: instruction and caption."""
    marks = _block_marks(config.caption)
    signs = "".join(sign for sign in "".join(marks) if not sign.isalnum() and not sign.isspace())
    plain = without_disguise(caption, signs) if signs else caption
    block = _fill(config.caption, caption=_without_marks(plain.strip(), marks))
    instruction = config.instruction.strip()
    return f"{instruction}\n{block}\n" if instruction else f"{block}\n"


def tail_text(stem: str, options: Sequence[str] | None, config: JudgePromptConfig) -> str:
    """The rest of the user message: question and option lines, lettered in the order given; None shows none.

    Raises:
        PromptError: more options than letters.
    """
    lines = ""
    if options is not None:
        if len(options) > len(LETTERS):
            raise PromptError(f"{len(options)} options, but only {len(LETTERS)} letters")
        pairs = zip(LETTERS, options, strict=False)
        lines = "".join(_fill(config.option, letter=a, text=one_line(text)) for a, text in pairs)
    return _fill(config.question, question=one_line(stem), options=lines).rstrip()


def check_placeholders(config: JudgePromptConfig, placeholders: Mapping[str, tuple[str, ...]]) -> None:
    """Passes templates that hold each of their placeholders once.

    Raises:
        PromptError: names the template.
    """
    for name, needed in placeholders.items():
        template = getattr(config, name)
        for placeholder in needed:
            if template.count("{" + placeholder + "}") != 1:
                raise PromptError(
                    f"judge.prompt.{name} must hold {{{placeholder}}} exactly once: {template!r}"
                )


def _chat_scaffold(tokenizer: Any) -> tuple[str, str]:
    """The chat template's text before and after one user message, up to where the assistant begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the judge's tokenizer has no chat template; take an instruction-tuned checkpoint")
    message = [{"role": "user", "content": _SENTINEL}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    opening, found, closing = text.partition(_SENTINEL)
    if not found or _SENTINEL in closing:
        raise PromptError("the judge's chat template does not show a user message exactly once")
    return opening, closing


def _fill(template: str, **values: str) -> str:
    """Puts values at their placeholders in one pass, so that braces in a value stay text."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def one_line(text: str) -> str:
    """The text with single spaces for all white space."""
    return " ".join(text.split())


def _block_marks(template: str) -> tuple[str, ...]:
    """What stands next to the caption on its lines and opens or closes its block; one sign is no mark."""
    before, _, after = template.partition("{caption}")
    marks = {before.strip().rpartition("\n")[2].strip(), after.strip().partition("\n")[0].strip()}
    return tuple(sorted(mark for mark in marks if len(mark) > 1 and re.search(r"[^\w\s]", mark)))


def without_disguise(text: str, signs: str) -> str:
    """The text with each character that may be read as one of `signs` (wide, small forms) as that one.

    Control and format characters go, since a tokenizer that drops them would join what they part; new lines
    and tabs stay.
    """
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(plain if (plain := unicodedata.normalize("NFKC", c)) in signs else c for c in kept)


def _without_marks(caption: str, marks: Sequence[str]) -> str:
    """Spells block marks out (`> > >`), so that the caption cannot end its block."""
    for mark in marks:
        while mark in caption:
            caption = caption.replace(mark, " ".join(mark))
    return caption
