"""Turns captions and questions into the judge's token ids; nothing in them can act as markup."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from caprl_async.config import JudgePromptConfig
from caprl_async.data.chat import ChatEncoder, NoChatTemplate, without_disguise

LETTERS = string.ascii_uppercase
ALWAYS = {"caption": ("caption",), "question": ("question",)}
"""The placeholders of each template of `judge.prompt` in every mode."""
WITH_LETTERS = {"question": ("options",), "option": ("letter", "text")}
"""The further ones where options are shown with letters."""


class PromptError(ValueError):
    """The judge's tokenizer and `judge.prompt` do not fit together."""


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
        try:
            self._chat = ChatEncoder(tokenizer)
        except NoChatTemplate as error:
            raise PromptError(f"the judge's checkpoint: {error}") from error
        self._closing = (*self._chat.closing, *self._chat.plain_ids(config.prefill))
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
        return self._chat.decode(ids)

    def plain_ids(self, text: str) -> list[int]:
        """Encodes data: no id in the result opens or closes anything, whatever the text spells."""
        return self._chat.plain_ids(text)

    def _encode_head(self, caption: str) -> tuple[int, ...]:
        return (*self._chat.opening, *self.plain_ids(head_text(caption, self._config)))

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
    block = _fill(config.caption, caption=without_marks(caption.strip(), marks, signs))
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


def without_marks(caption: str, marks: Sequence[str], signs: str) -> str:
    """Spells block marks out (`> > >`), so that the caption cannot end its block; `signs` are what they are
    made of.
    """
    caption = without_disguise(caption, signs) if signs else caption
    for mark in marks:
        while mark in caption:
            caption = caption.replace(mark, " ".join(mark))
    return caption
