"""What an evaluation is asked to measure, and what it answers; plain data."""

from __future__ import annotations

from typing import Literal, TypedDict

from caprl_async.config import Config
from caprl_async.types import Sampling, Struct, Version


class EvalError(ValueError):
    """An evaluation that cannot be done as asked; the message says what to set."""


class EvalSpec(Struct, frozen=True):
    """What to measure. A judge answers the questions of its own file about the same captions."""

    name: str  # of the evaluation; also of its file run_dir/evals/<name>.jsonl
    source: Literal["policy", "reference", "blind"] = (
        "policy"  # sampled, from the data set, or empty captions
    )
    images: int = 0  # the first so many held-out rows; 0: all
    sampling: Sampling = Sampling(n=1, temperature=1.0, max_tokens=1024)  # of the policy's captions
    version: Version | None = None  # caption only under exactly these weights
    judges: tuple[str, ...] = ("judge",)


def heldout_spec(
    config: Config,
    name: str,
    source: Literal["policy", "reference", "blind"] = "policy",
    *,
    min_tokens: int = 0,
    version: Version | None = None,
) -> EvalSpec:
    """What `evaluate.*` says: the held-out images, one caption each, every judge that there is."""
    evaluate = config.evaluate
    sampling = Sampling(
        n=1,
        temperature=evaluate.temperature,
        max_tokens=config.rollout.max_tokens,
        min_tokens=min_tokens,
        seed=config.seed,
    )
    return EvalSpec(
        name=name,
        source=source,
        images=evaluate.images,
        sampling=sampling,
        version=version,
        judges=("judge", "heldout") if evaluate.heldout_judge.model else ("judge",),
    )


class Accuracy(TypedDict):
    """Over scored questions, each counting the same."""

    accuracy: float  # share whose most likely option is the right one; NaN of a rating
    score: float  # mean probability of the right option
    n: int


class JudgeResult(Accuracy):
    kinds: dict[str, Accuracy]  # by kind of question
    unscored: int


class EvalResult(TypedDict):
    """Plain data; NaN where there was nothing to take a mean of."""

    name: str
    images: int
    failed: int  # images without a caption or without verdicts after `max_attempts`
    judges: dict[str, JudgeResult]
    length: float | None  # mean tokens per caption; None where the captions are not the policy's
    truncated: float  # share of captions cut at max_tokens
    facts: dict[str, float] | None  # precision, recall over all captions; None without evaluate.program
    program_faults: int  # captions at which evaluate.program failed; not in `facts`
    program_fault: str  # the last of them; empty without one
