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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.engine.types import Request, Response
from caprl_async.judge.letters import read_letter, read_option
from caprl_async.judge.permutations import Order, balanced_orders, random_draws, seed_of
from caprl_async.judge.prompt import LETTERS, JudgePrompter
from caprl_async.types import Outcome, Question, Verdict

SAMPLE_TOKENS = 10  # longest written answer; as released with the paper
LOWEST_TEMPERATURE = 0.01  # vLLM raises anything lower to this


class JudgeConfigError(ValueError):
    """The judge cannot work as configured; the message names the key."""


@dataclass(frozen=True)
class Asking:
    """One question as it is put to every caption of a group."""

    question: Question
    options: tuple[str, ...]  # the choices, then the abstain option
    orders: tuple[Order, ...] = ()  # one per prefill or draw; none where no options are shown
    seeds: tuple[int, ...] = ()  # of the draws

    @property
    def gold(self) -> int:
        """Index of the right option; the abstain option for questions about what is absent."""
        answer = self.question.answer
        return len(self.options) - 1 if answer is None else answer


Planned: TypeAlias = Asking | Verdict
"""A question to put to the engine, or what is known of it without asking."""


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
        if twice := _first_double(tokens):
            same = [_one_line(text) for text, ids in zip(options, tokens, strict=True) if ids == twice[0]]
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
        mass = [0.0] * len(asking.options)
        for order, response in zip(asking.orders, responses, strict=True):
            chosen = response.completions[0].chosen_logprobs
            for letter, option in zip(self._letters, order, strict=False):
                mass[option] += math.exp(chosen[letter]) / len(asking.orders)
        return scored(asking, mass, off=1.0 - math.fsum(mass))


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


def check_numbers(config: JudgeConfig) -> None:
    """Passes numbers that fit the mode.

    Raises:
        JudgeConfigError: `judge.permutations`, `judge.draws` or `judge.temperature` is out of range for it.
    """
    if config.mode is JudgeMode.expected and config.permutations < 1:
        raise JudgeConfigError(f"judge.permutations must be at least 1, not {config.permutations}")
    if config.mode is JudgeMode.sample and config.draws < 1:
        raise JudgeConfigError(f"judge.draws must be at least 1, not {config.draws}")
    divides = config.mode in (JudgeMode.expected, JudgeMode.likelihood)
    if divides and config.temperature < LOWEST_TEMPERATURE:
        raise JudgeConfigError(
            f"judge.temperature must be at least {LOWEST_TEMPERATURE} in {config.mode.value} mode, "
            f"not {config.temperature}; the greedy judge exists in sample and text mode only"
        )


def all_options(question: Question, config: JudgeConfig) -> tuple[str, ...]:
    """The choices, then the abstain option."""
    return (*question.choices, config.prompt.abstain)


def text_fault(question: Question, options: Sequence[str]) -> str | None:
    """Why no score of a question with these option texts would mean anything; None if it would."""
    if not question.choices:
        return "no choices"
    if question.answer is not None and not 0 <= question.answer < len(question.choices):
        return f"the answer {question.answer} is none of the {len(question.choices)} choices"
    texts = [_one_line(option) for option in options]
    if not all(texts):
        return "an option is empty"
    if twice := _first_double(texts):
        return f"two options read {twice[0]!r}"
    return None


def letters_fault(options: Sequence[str]) -> str | None:
    """Why the options cannot have letters; None if they can."""
    return f"{len(options)} options are more than there are letters" if len(options) > len(LETTERS) else None


def plan_sound(
    questions: Sequence[Question],
    faults: Sequence[str | None],
    arrange: Callable[[Sequence[Question]], Sequence[Planned]],
) -> tuple[Planned, ...]:
    """`arrange` of the questions without a fault; the others are unscorable in their places."""
    sound = [question for question, fault in zip(questions, faults, strict=True) if fault is None]
    asked = iter(arrange(sound))
    return tuple(
        next(asked) if fault is None else unscorable(question, fault)
        for question, fault in zip(questions, faults, strict=True)
    )


def ordered_askings(questions: Sequence[Question], rotation: int, config: JudgeConfig) -> list[Planned]:
    """Each question in `judge.permutations` orders (mode `expected`)."""
    orders = balanced_orders(questions, rotation, config.permutations)
    return [Asking(q, all_options(q, config), o) for q, o in zip(questions, orders, strict=True)]


def text_askings(questions: Sequence[Question], rotation: int, config: JudgeConfig) -> list[Planned]:
    """Each question once, with a seed for its answer (mode `text`)."""
    return [
        Asking(q, all_options(q, config), seeds=(seed_of("text", rotation, q.question_id),))
        for q in questions
    ]


def drawn_askings(questions: Sequence[Question], rotation: int, config: JudgeConfig) -> list[Planned]:
    """`judge.draws` draws spread over the questions (mode `sample`); those not drawn are not asked."""
    draws = random_draws(questions, rotation, config.draws)
    planned: list[Planned] = []
    for index, question in enumerate(questions):
        mine = [draw for draw in draws if draw.question == index]
        orders, seeds = tuple(draw.order for draw in mine), tuple(draw.seed for draw in mine)
        planned.append(
            Asking(question, all_options(question, config), orders, seeds)
            if mine
            else Verdict(question_id=question.question_id, outcome=Outcome.NOT_ASKED, draws=0)
        )
    return planned


def sample_verdict(asking: Asking, written: Sequence[str]) -> Verdict:
    """What the answers of all draws, in the order of `asking.orders`, amount to: shares of the draws."""
    draws = len(asking.orders)
    counts: Counter[int | None] = Counter()
    for order, text in zip(asking.orders, written, strict=True):
        letter = read_letter(text, len(order))
        counts[None if letter is None else order[letter]] += 1
    share = [counts[option] / draws for option in range(len(asking.options))]
    return scored(asking, share, off=counts[None] / draws, draws=draws)


def unscorable(question: Question, reason: str) -> Verdict:
    """The question leaves the mean, and says why."""
    return Verdict(question_id=question.question_id, outcome=Outcome.UNSCORABLE, reason=reason)


def text_verdict(asking: Asking, written: str) -> Verdict:
    """What an answer in own words amounts to: 1 if it says the gold option, else 0."""
    said = read_option(written, asking.options)
    return Verdict(
        question_id=asking.question.question_id,
        outcome=Outcome.SCORED,
        score=float(said == asking.gold),
        abstained=float(said == len(asking.options) - 1),
        off_options=float(said is None),
        choice=written.strip() if said is None else asking.options[said],
    )


def scored(asking: Asking, mass: Sequence[float], off: float, draws: int = 1) -> Verdict:
    """The verdict of `mass` on each option and `off` on none; unscorable if a mass is no number."""
    if not all(map(math.isfinite, mass)):
        return unscorable(
            asking.question, "the judge's probabilities are no numbers (overflow in its dtype?)"
        )
    best = max(range(len(mass)), key=mass.__getitem__)
    return Verdict(
        question_id=asking.question.question_id,
        outcome=Outcome.SCORED,
        score=min(mass[asking.gold], 1.0),
        abstained=min(mass[-1], 1.0),
        off_options=min(max(off, 0.0), 1.0),
        choice=asking.options[best] if mass[best] > 0 else None,
        draws=draws,
    )


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first_double(values: Sequence[object]) -> list[object]:
    return [value for value, count in Counter(values).items() if count > 1][:1]
