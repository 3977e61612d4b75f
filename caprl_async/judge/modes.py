"""The judge's ways to score: engine requests for a caption and a question, and the verdict the answers make.

Pure: no engine, no clock. `expected` is the exact mean of `sample`: with option letters l, the sampler's
distribution p = softmax(logits / T) over the whole vocabulary at the first answer token, and orders o,

    score = mean_o p_o(letter of the gold option),    off_options = mean_o (1 - sum_l p_o(l)).

It asks one prefill per order where `sample` generates; mass on other tokens stays in the denominator.
(`sample` also reads a letter spelled by another first token, such as `B)`; `expected` counts that as off.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.engine.types import Request, Response
from caprl_async.judge.permutations import Order, seed_of
from caprl_async.judge.prompt import LETTERS, JudgePrompter, one_line
from caprl_async.judge.verdicts import (
    SAMPLE_TOKENS,
    Asking,
    Planned,
    all_options,
    check_numbers,
    drawn_askings,
    first_double,
    letters_fault,
    ordered_askings,
    ordered_verdict,
    plan_sound,
    sample_verdict,
    scored,
    text_askings,
    text_fault,
    text_verdict,
    words_fault,
)
from caprl_async.types import Question, Verdict


class Mode(ABC):
    """One way to score. `plan` once per group; `requests` and `verdict` for each caption."""

    def __init__(self, prompter: JudgePrompter, config: JudgeConfig) -> None:
        check_numbers(config)
        self.prompter = prompter
        self.config = config

    def plan(self, questions: Sequence[Question], rotation: int) -> tuple[Planned, ...]:
        """What is asked of every caption, in the order of `questions`; bad questions become verdicts here."""
        faults = [self._fault(question) for question in questions]
        return plan_sound(questions, faults, lambda sound: self._arrange(sound, rotation))

    @abstractmethod
    def requests(self, asking: Asking, caption: str) -> list[Request]:
        """What to ask the engine; all may be asked at once."""

    @abstractmethod
    def verdict(self, asking: Asking, responses: Sequence[Response]) -> Verdict:
        """What the answers to `requests`, in their order, amount to."""

    @abstractmethod
    def _arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]: ...

    def _options(self, question: Question) -> tuple[str, ...]:
        return all_options(question, self.config)

    def _fault(self, question: Question) -> str | None:
        """Why no score of this question would mean anything."""
        options = self._options(question)
        if fault := text_fault(question, options):
            return fault
        tokens = [self.prompter.option_ids(option) for option in options]
        if not all(tokens):
            return "an option has no tokens in the judge's vocabulary"
        if twice := first_double(tokens):
            same = [one_line(text) for text, ids in zip(options, tokens, strict=True) if ids == twice[0]]
            return f"the judge's vocabulary cannot tell {' from '.join(map(repr, same))}"
        return None


class _LetterMode(Mode):
    """Options are shown with letters."""

    def __init__(self, prompter: JudgePrompter, config: JudgeConfig) -> None:
        super().__init__(prompter, config)
        self._letters = prompter.letter_ids(len(LETTERS))

    def _fault(self, question: Question) -> str | None:
        return letters_fault(self._options(question)) or super()._fault(question)

    def _prompt(self, asking: Asking, order: Order, caption: str) -> tuple[int, ...]:
        shown = [asking.options[index] for index in order]
        return (*self.prompter.head(caption), *self.prompter.tail(asking.question.stem, shown))


class Expected(_LetterMode):
    """The exact mean of `Sample`: one prefill per order, the letters' probabilities instead of draws."""

    def _arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return ordered_askings(questions, rotation, self.config)

    def requests(self, asking: Asking, caption: str) -> list[Request]:
        letters = self._letters[: len(asking.options)]
        temperature = self.config.temperature
        return [
            Request(self._prompt(asking, order, caption), temperature=temperature, logprob_token_ids=letters)
            for order in asking.orders
        ]

    def verdict(self, asking: Asking, responses: Sequence[Response]) -> Verdict:
        letters = self._letters[: len(asking.options)]
        chosen = [response.completions[0].chosen_logprobs for response in responses]
        return ordered_verdict(asking, [[math.exp(one[letter]) for letter in letters] for one in chosen])


class Sample(_LetterMode):
    """The paper's reward: questions drawn with replacement, options shuffled, an answer written and read."""

    def _arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return drawn_askings(questions, rotation, self.config)

    def requests(self, asking: Asking, caption: str) -> list[Request]:
        return [
            Request(
                self._prompt(asking, order, caption),
                temperature=self.config.temperature,
                max_tokens=SAMPLE_TOKENS,
                seed=seed_of("answer", seed, caption),
            )
            for order, seed in zip(asking.orders, asking.seeds, strict=True)
        ]

    def verdict(self, asking: Asking, responses: Sequence[Response]) -> Verdict:
        written = [self.prompter.decode(response.completions[0].token_ids) for response in responses]
        return sample_verdict(asking, written)


class Likelihood(Mode):
    """For judges too small for letters: which option's text is the likeliest answer, options not shown.

    With tokens t_1..t_L of an option, s = (1/L) sum_i log p(t_i | prompt, t_<i), at temperature 1; the score
    is softmax(s / T) over the options. Each distinct proper prefix of an option is one prefill, shared by the
    options that begin with it. `off_options` is the first token's mass on no option.
    """

    def _arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return [Asking(question, self._options(question)) for question in questions]

    def _fault(self, question: Question) -> str | None:
        fault = super()._fault(question)
        if fault is not None:
            return fault
        for option in self._options(question):
            if not self.prompter.knows(self.prompter.option_ids(option)):
                return f"the option {option!r} has words that the judge's vocabulary lacks"
        return None

    def requests(self, asking: Asking, caption: str) -> list[Request]:
        prompt = (*self.prompter.head(caption), *self.prompter.tail(asking.question.stem, None))
        branches = self._branches(asking)
        return [Request((*prompt, *prefix), logprob_token_ids=tuple(ids)) for prefix, ids in branches.items()]

    def verdict(self, asking: Asking, responses: Sequence[Response]) -> Verdict:
        logprobs = {
            prefix: response.completions[0].chosen_logprobs
            for prefix, response in zip(self._branches(asking), responses, strict=True)
        }
        scores = []
        for option in asking.options:
            ids = self.prompter.option_ids(option)
            scores.append(math.fsum(logprobs[ids[:i]][token] for i, token in enumerate(ids)) / len(ids))
        off = 1.0 - math.fsum(math.exp(value) for value in logprobs[()].values())
        return scored(asking, _softmax([score / self.config.temperature for score in scores]), off=off)

    def _branches(self, asking: Asking) -> dict[tuple[int, ...], list[int]]:
        """Each proper prefix of the options' tokens -> the tokens that may follow, in a fixed order."""
        branches: dict[tuple[int, ...], list[int]] = {}
        for option in asking.options:
            ids = self.prompter.option_ids(option)
            for i, token in enumerate(ids):
                following = branches.setdefault(ids[:i], [])
                if token not in following:
                    following.append(token)
        return branches


class Text(Mode):
    """For evaluation: an answer in the judge's own words, options not shown; right if it says the gold one.

    Greedy unless `judge.temperature` is above 0. `choice` is the option that the answer says (see
    `letters.read_option`), else the answer as it was written, which counts as off the options.
    """

    def _fault(self, question: Question) -> str | None:
        return super()._fault(question) or words_fault(self._options(question))

    def _arrange(self, questions: Sequence[Question], rotation: int) -> list[Planned]:
        return text_askings(questions, rotation, self.config)

    def requests(self, asking: Asking, caption: str) -> list[Request]:
        prompt = (*self.prompter.head(caption), *self.prompter.tail(asking.question.stem, None))
        return [
            Request(
                prompt,
                temperature=self.config.temperature,
                max_tokens=self.config.text_tokens,
                seed=seed_of("answer", asking.seeds[0], caption),
            )
        ]

    def verdict(self, asking: Asking, responses: Sequence[Response]) -> Verdict:
        return text_verdict(asking, self.prompter.decode(responses[0].completions[0].token_ids))


_MODES: dict[JudgeMode, type[Mode]] = {
    JudgeMode.expected: Expected,
    JudgeMode.sample: Sample,
    JudgeMode.likelihood: Likelihood,
    JudgeMode.text: Text,
}


def make_mode(prompter: JudgePrompter, config: JudgeConfig) -> Mode:
    """The mode that `config.mode` names.

    Raises:
        PromptError: a letter mode, and the tokenizer has no single token for a letter.
        JudgeConfigError: a number of `config` is out of range for the mode.
    """
    return _MODES[config.mode](prompter, config)


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / math.fsum(weights) for weight in weights]
