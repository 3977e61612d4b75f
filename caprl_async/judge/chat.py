"""What a judge that is served elsewhere is asked over a chat-completions API, and how answers become scores.

Pure: no client, no clock. The user message is the text that `prompt.JudgePrompter` encodes. The server
tokenises it, so whatever captions and questions spell is made harmless in the text itself.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.data.chat import escape_markup
from caprl_async.endpoint.protocol import Choice, Logprobs, Position, url_problems
from caprl_async.judge import verdicts
from caprl_async.judge.letters import read_letter
from caprl_async.judge.permutations import Order, seed_of
from caprl_async.judge.prompt import (
    ALWAYS,
    WITH_LETTERS,
    check_placeholders,
    head_text,
    tail_text,
)
from caprl_async.judge.verdicts import Asking, JudgeConfigError, Planned
from caprl_async.types import Question, Verdict

TOP_LOGPROBS = (20, 5)
"""Likeliest tokens to ask for; the next number where an API refuses the one before."""
LETTER_ONLY = "Answer with the letter of the option only."
BRIEFLY = "Answer with a word or a short phrase only."


class NoLogprobs(ValueError):
    """An answer comes without the log-probabilities that were asked for."""


def letter_mass(top: Sequence[tuple[str, float]], letters: int, temperature: float) -> list[float]:
    """Probability of each of the first `letters` letters at `temperature` T, from an API's likeliest tokens.

    With p_i = exp(log-probability) of the returned tokens at temperature 1 and r = 1 - sum_i p_i,

        p_T(i) = p_i^(1/T) / Z,    Z = sum_i p_i^(1/T) + r^(1/T).

    The tokens that were not returned count as one. As 1/T >= 1, r^(1/T) is at least what they add to Z, so no
    letter gets more than its share; a letter among them gets 0 of at most r^(1/T) / Z. A token counts for the
    letter that `read_letter` reads in it (`B`, ` B`, `B)`), any other for none.

    Raises:
        NoLogprobs: `top` is empty or holds what is no log-probability.
    """
    values = [value for _, value in top]
    total = math.fsum(map(math.exp, values)) if all(value < 0.01 for value in values) else math.inf
    if not values or not total < 1.01:  # the tolerance is for sums of rounded numbers
        raise NoLogprobs("the server's answer lacks log-probabilities")
    if total < 1:
        values.append(math.log1p(-total))
    peak = max(values)
    weights = [math.exp((value - peak) / temperature) for value in values]
    mass = [0.0] * letters
    for (token, _), weight in zip(top, weights, strict=False):
        letter = read_letter(token, letters)
        if letter is not None:
            mass[letter] += weight / math.fsum(weights)
    return mass


# ---------------------------------------------------------------- ways to ask and to score


class Way(ABC):
    """One way to score over a chat API, as `modes.Mode` is over an engine."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config

    @abstractmethod
    def arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        """What is asked of every caption."""

    @abstractmethod
    def bodies(self, asking: Asking, caption: str) -> list[dict[str, Any]]:
        """The requests, without the model's name."""

    @abstractmethod
    def verdict(self, asking: Asking, choices: Sequence[Choice]) -> Verdict:
        """What the answers to `bodies`, in their order, amount to.

        Raises:
            ValueError: an answer lacks what is read in it.
        """

    def _body(self, asking: Asking, order: Order | None, caption: str) -> dict[str, Any]:
        """One request; without an order no options are shown."""
        prompt = self.config.prompt
        shown = None if order is None else [escape_markup(asking.options[index]) for index in order]
        tail = tail_text(escape_markup(asking.question.stem), shown, prompt)
        text = head_text(escape_markup(caption), prompt) + tail
        if not self.config.endpoint.prefill:
            last = BRIEFLY if order is None else LETTER_ONLY
            return {"messages": [{"role": "user", "content": f"{text}\n{last}"}], "top_p": 1.0}
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": prompt.prefill}]
        # Servers that go on from a prefill take these too; without them a checkpoint's own defaults creep in.
        plain = {"top_k": -1, "repetition_penalty": 1.0}
        extra = {"continue_final_message": True, "add_generation_prompt": False, **plain}
        return {"messages": messages, "top_p": 1.0, "extra_body": extra}


class Expected(Way):
    """One token per order; its likeliest alternatives give the letters' probabilities (`letter_mass`)."""

    def __init__(self, config: JudgeConfig, top: int) -> None:
        super().__init__(config)
        self.top = top

    def arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return verdicts.ordered_askings(questions, rotation, self.config)

    def bodies(self, asking: Asking, caption: str) -> list[dict[str, Any]]:
        # At temperature 1 an API's log-probabilities are the model's own, whether it scales them or not.
        first = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": self.top}
        return [self._body(asking, order, caption) | first for order in asking.orders]

    def verdict(self, asking: Asking, choices: Sequence[Choice]) -> Verdict:
        letters = []
        for choice in choices:
            positions = (choice.logprobs or Logprobs()).content or [Position()]
            top = [(token.token, token.logprob) for token in positions[0].top_logprobs or ()]
            letters.append(letter_mass(top, len(asking.options), self.config.temperature))
        return verdicts.ordered_verdict(asking, letters)


class Sample(Way):
    """One written answer per draw."""

    def arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return verdicts.drawn_askings(questions, rotation, self.config)

    def bodies(self, asking: Asking, caption: str) -> list[dict[str, Any]]:
        drawn = {"max_tokens": verdicts.SAMPLE_TOKENS, "temperature": self.config.temperature}
        return [
            self._body(asking, order, caption) | drawn | {"seed": seed_of("answer", seed, caption) % 2**31}
            for order, seed in zip(asking.orders, asking.seeds, strict=True)
        ]

    def verdict(self, asking: Asking, choices: Sequence[Choice]) -> Verdict:
        return verdicts.sample_verdict(asking, _written(choices))


class Text(Way):
    """One answer in own words, options not shown."""

    def arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return verdicts.text_askings(questions, rotation, self.config)

    def bodies(self, asking: Asking, caption: str) -> list[dict[str, Any]]:
        seed = seed_of("answer", asking.seeds[0], caption) % 2**31
        free = {"max_tokens": self.config.text_tokens, "temperature": self.config.temperature, "seed": seed}
        return [self._body(asking, None, caption) | free]

    def verdict(self, asking: Asking, choices: Sequence[Choice]) -> Verdict:
        return verdicts.text_verdict(asking, _written(choices)[0])


def _written(choices: Sequence[Choice]) -> list[str]:
    """
    Raises:
        ValueError: an answer has no text.
    """
    texts = [choice.message.content or "" for choice in choices]
    if not all(text.strip() for text in texts):
        raise ValueError("the server's answer has no text (does the model think first?)")
    return texts


def clashes(config: JudgeConfig) -> Iterator[str]:
    """A sentence for each setting that does not suit an endpoint."""
    yield from url_problems(config.endpoint.url, "judge.endpoint")
    if config.mode is JudgeMode.likelihood:
        yield (
            "judge.mode=likelihood with judge.endpoint.url: a chat API scores no given texts; use "
            "judge.mode=expected, sample or text"
        )
    if config.mode is JudgeMode.expected and config.temperature > 1:
        yield (
            f"judge.temperature={config.temperature:g} with judge.mode=expected and judge.endpoint.url: the "
            "tokens that the server does not return are bounded for temperatures up to 1 only"
        )
    if config.endpoint.prefill and not config.prompt.prefill.strip():
        yield "judge.endpoint.prefill=true with an empty judge.prompt.prefill: there is nothing to go on from"


def ways_to_ask(config: JudgeConfig) -> list[Way]:
    """How a server may be asked in `config.mode`, best first: `expected` has `sample` to fall back on.

    Raises:
        JudgeConfigError, PromptError: `config` does not suit an endpoint.
    """
    check_placeholders(config.prompt, ALWAYS)
    for clash in clashes(config):
        raise JudgeConfigError(clash)
    verdicts.check_numbers(config)
    if config.mode is JudgeMode.text:
        return [Text(config)]
    check_placeholders(config.prompt, WITH_LETTERS)
    sample = dataclasses.replace(config, mode=JudgeMode.sample)
    verdicts.check_numbers(sample)
    exact = [Expected(config, top) for top in TOP_LOGPROBS] if config.mode is JudgeMode.expected else []
    return [*exact, Sample(sample)]
