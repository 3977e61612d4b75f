"""What can be leased, and what whoever wants it done must answer; between the flows and the leases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from caprl_async.config import Config, JudgeMode
from caprl_async.judge.panel import panel
from caprl_async.types import (
    CaptionGroup,
    ImageRef,
    Outcome,
    Prompt,
    Purpose,
    Question,
    Verdict,
    Version,
)

Verdicts: TypeAlias = tuple[tuple[Verdict, ...], ...]
"""[caption][question]."""


@dataclass(frozen=True)
class GenerateWork:
    """Caption one prompt."""

    owner: WorkOwner = field(repr=False)
    prompt: Prompt
    engine: Version | None  # weights of the engine that it was given to, at that time

    @property
    def key(self) -> str:
        return self.prompt.key

    @property
    def attempt(self) -> int:
        return self.prompt.attempt


@dataclass(frozen=True)
class JudgeWork:
    """Answer all questions about all captions of one group."""

    owner: WorkOwner = field(repr=False)
    key: str
    attempt: int
    captions: tuple[str, ...]
    questions: tuple[Question, ...]
    rotation: int
    serves: str  # which judges
    peer: str = ""  # who was given it
    image: ImageRef | None = None  # see `shown_to`


def shown_to(config: Config, serves: str, image: ImageRef | None) -> ImageRef | None:
    """What a judge sees beside captions: nothing, unless the conf has it rate them (`judge.mode=rate`)."""
    rates = config.judge.mode is JudgeMode.rate and serves in panel(config.judge)
    return image if rates else None


Work: TypeAlias = GenerateWork | JudgeWork


class WorkOwner(Protocol):
    """Who makes work and takes its results: training, or one evaluation.

    For each piece of work taken by `next_*` exactly one of `generated`, `judged` and `failed` is called.
    """

    def next_generate(self, peer: str, engine: Version | None, now: float) -> GenerateWork | None:
        """Work for a rollout whose engine has these weights."""

    def next_judge(self, peer: str, serves: str, now: float) -> JudgeWork | None:
        """Work for a judge that serves these questions."""

    def waiting_judges(self) -> set[str]:
        """Which judges have work waiting for them, now or after a pause."""

    def generated(self, work: GenerateWork, group: CaptionGroup, now: float) -> None:
        """The captions, checked against the prompt."""

    def judged(self, work: JudgeWork, verdicts: Verdicts, now: float) -> None:
        """The verdicts, checked against captions and questions."""

    def failed(self, work: Work, reason: str, now: float, *, lost: bool = False) -> None:
        """The peer failed or answered nonsense; `lost`: it died, fell silent or took too long."""


_MAX_ID = _MAX_DRAWS = 2**31  # beyond are neither tokens nor counts


def wrong_group(prompt: Prompt, group: CaptionGroup) -> str | None:
    """What in an answer does not fit its prompt, or is no number to train on; None if all is well."""
    if (group.key, group.attempt) != (prompt.key, prompt.attempt):
        return f"captions of {group.key}, attempt {group.attempt}, for {prompt.key}, attempt {prompt.attempt}"
    if group.image_sha256 != prompt.image.sha256:
        return f"captions of image {group.image_sha256[:12]} for image {prompt.image.sha256[:12]}"
    if len(group.captions) != prompt.sampling.n:
        return f"{len(group.captions)} captions, asked for {prompt.sampling.n}"
    if not group.prompt_token_ids or not _are_tokens(group.prompt_token_ids):
        return "what the engine saw as the prompt are no tokens"
    sides = [side for grid in group.image_grid for side in grid]
    if len(group.image_grid) != len(prompt.image.pictures) or not all(0 < s < _MAX_ID for s in sides):
        return f"an image grid of {group.image_grid[:2]} patches"
    if not (math.isfinite(group.started) and math.isfinite(group.finished)):
        return f"captioned from {group.started} to {group.finished}"
    for caption in group.captions:
        length = len(caption.token_ids)
        unneeded = prompt.purpose is Purpose.EVAL and not caption.logprobs
        if not length or (len(caption.logprobs) != length and not unneeded):
            return f"a caption has {length} tokens and {len(caption.logprobs)} log-probabilities"
        if length > prompt.sampling.max_tokens or not _are_tokens(caption.token_ids):
            return f"a caption of {length} tokens, of which one is none, or more than asked for"
        if not all(map(math.isfinite, caption.logprobs)) or max(caption.logprobs, default=0.0) > 0:
            return "a token has no finite log-probability of 0 or less"
        edges = [0, *(span.end for span in caption.spans)]
        if (
            [span.start for span in caption.spans] != edges[:-1]
            or edges[-1] != length
            or sorted(edges) != edges
        ):
            return f"version spans do not cover the {length} tokens of a caption"
    return None


def _are_tokens(ids: Sequence[int]) -> bool:
    return min(ids) >= 0 and max(ids) < _MAX_ID


def wrong_verdicts(work: JudgeWork, verdicts: Verdicts) -> str | None:
    """What in an answer does not fit its captions and questions; None if all is well."""
    if len(verdicts) != len(work.captions):
        return f"verdicts on {len(verdicts)} captions, asked for {len(work.captions)}"
    asked = [question.question_id for question in work.questions]
    for row in verdicts:
        if [verdict.question_id for verdict in row] != asked:
            return "verdicts are not on the questions that were asked, in their order"
        for verdict in row:
            scored = verdict.outcome is Outcome.SCORED
            if scored != (verdict.score is not None) or not _is_share(verdict.score):
                return f"a verdict that is {verdict.outcome.value}, with score {verdict.score}"
            if not _is_share(verdict.abstained) or not _is_share(verdict.off_options):
                return f"a verdict with abstained {verdict.abstained} and off_options {verdict.off_options}"
            if not scored <= verdict.draws < _MAX_DRAWS:
                return f"a verdict of {verdict.draws} draws"
    return None


def _is_share(value: float | None) -> bool:
    return value is None or 0.0 <= value <= 1.0 + 1e-6


OUTAGE_ATTEMPTS = 4
"""Times `replay.max_attempts`: how often one group is asked about while no other is answered."""


class Asked(Protocol):
    """Who a judge was asked about: one prompt, or one image of an evaluation."""

    failures: int  # that it is to blame for
    downs: int  # how often its judge failed, whoever was to blame
    judged_then: int | None  # how many others had been answered when it last did


def may_ask_again(asked: Asked, judged: int, most: int, *, own: bool = False) -> bool:
    """Counts a failure of the judge at this one; False if it has had enough.

    In an outage none is to blame. One is if the judge answered the rest of it (`own`), or others since it
    failed at this one before; and where there are no others, if it fails very often.

    Args:
        judged: how many have been answered so far.
        most: `replay.max_attempts`.
    """
    asked.failures += own or (asked.judged_then is not None and judged > asked.judged_then)
    asked.judged_then = judged
    asked.downs += 1
    return asked.failures < most and asked.downs < OUTAGE_ATTEMPTS * most


@dataclass(frozen=True)
class Down:
    """Verdicts that could not be had: the group is judged again."""

    reason: str
    whole: bool  # the judge answered nothing at all; else it is up, and some of its answers are missing


def judge_down(verdicts: Verdicts) -> Down | None:
    """Whether a verdict could not be had, and why."""
    every = [verdict for row in verdicts for verdict in row]
    down = next((verdict for verdict in every if verdict.outcome is Outcome.JUDGE_DOWN), None)
    if down is None:
        return None
    whole = not any(verdict.outcome is Outcome.SCORED for verdict in every)
    return Down(f"judge down: {down.reason or 'it did not say why'}", whole)
