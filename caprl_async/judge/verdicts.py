"""What every way of judging shares: questions as they are asked, and the verdicts that answers make. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.judge.letters import plain_option, read_letter, read_option
from caprl_async.judge.permutations import Order, balanced_orders, random_draws, seed_of
from caprl_async.judge.prompt import LETTERS, one_line
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
    texts = [one_line(option) for option in options]
    if not all(texts):
        return "an option is empty"
    if twice := first_double(texts):
        return f"two options read {twice[0]!r}"
    return None


def letters_fault(options: Sequence[str]) -> str | None:
    """Why the options cannot have letters; None if they can."""
    return f"{len(options)} options are more than there are letters" if len(options) > len(LETTERS) else None


def words_fault(options: Sequence[str]) -> str | None:
    """Why no answer in own words could say one of the options; None if one can."""
    plain = [plain_option(option) for option in options]
    if not all(plain):
        return f"the option {options[plain.index('')]!r} is nothing that an answer could say"
    if twice := first_double(plain):
        return f"two options would be answered by {twice[0]!r}"
    return None


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


def ordered_verdict(asking: Asking, letters: Sequence[Sequence[float]]) -> Verdict:
    """What the letters' probabilities, one list for each of `asking.orders`, amount to: a mean by option."""
    mass = [0.0] * len(asking.options)
    for order, probabilities in zip(asking.orders, letters, strict=True):
        for option, probability in zip(order, probabilities, strict=True):
            mass[option] += probability / len(asking.orders)
    return scored(asking, mass, off=1.0 - math.fsum(mass))


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


def no_answer(question: Question, reason: str) -> Verdict:
    """The judge is down for this question: ask again."""
    return Verdict(question_id=question.question_id, outcome=Outcome.JUDGE_DOWN, reason=reason)


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


def first_double(values: Sequence[object]) -> list[object]:
    """The first value that comes twice, alone in a list; empty if none does."""
    return [value for value, count in Counter(values).items() if count > 1][:1]
