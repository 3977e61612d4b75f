"""From a prompt to an engine request, and from the engine's response to a caption group; no I/O, no engine.

A group leaves here only if what the learner relies on holds: the engine saw the prompt and as many visual
tokens as the processor makes of the image; every sampled token has a finite log-probability and a version.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from caprl_async.engine.types import Completion, Request, Response
from caprl_async.types import Caption, CaptionGroup, Prompt

if TYPE_CHECKING:
    from caprl_async.data.processor import Grid, PolicyProcessor


class BadSample(ValueError):
    """The engine's response must not be trained on; the message says what does not fit."""


def request(prompt: Prompt, processor: PolicyProcessor) -> Request:
    """What the engine is asked for one prompt."""
    sampling = prompt.sampling
    return Request(
        prompt_token_ids=processor.prompt_ids(prompt.text, prompt.image.times),
        image=prompt.image,
        n=sampling.n,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        # vLLM numbers the n completions seed, seed + 1, ...: neighbouring prompts must not share them.
        seed=None if sampling.seed is None else sampling.seed * sampling.n,
        want_logprobs=True,
    )


def caption_group(
    prompt: Prompt,
    asked: Request,
    answer: Response,
    grids: tuple[Grid, ...],
    processor: PolicyProcessor,
    *,
    actor: str,
    started: float,
    finished: float,
) -> CaptionGroup:
    """The group of captions that `answer` holds. `grids`: patches the processor makes of each picture.

    Raises:
        BadSample: see the module.
    """
    check_prompt(processor.expanded(asked.prompt_token_ids, grids), answer, processor.image_token_id)
    if len(answer.completions) != prompt.sampling.n:
        raise BadSample(f"{len(answer.completions)} completions, asked for {prompt.sampling.n}")
    for completion in answer.completions:
        check_completion(completion, frozenset(processor.banned_token_ids))
    return CaptionGroup(
        key=prompt.key,
        attempt=prompt.attempt,
        prompt_token_ids=answer.prompt_token_ids,
        image_sha256=prompt.image.sha256,
        image_grid=grids,
        captions=tuple(_caption(completion) for completion in answer.completions),
        actor=actor,
        started=started,
        finished=finished,
    )


def check_prompt(expected: tuple[int, ...], answer: Response, image_token: int) -> None:
    """The engine's prompt is the expected one, with its placeholders expanded.

    Raises:
        BadSample: it is another prompt, or the engine resized a picture differently.
    """
    if answer.prompt_token_ids != expected:
        seen = answer.prompt_token_ids.count(image_token)
        raise BadSample(
            f"the engine saw {len(answer.prompt_token_ids)} prompt tokens, {seen} of them visual; the "
            f"processor makes {len(expected)} and {expected.count(image_token)}: both must use the conf's "
            "pixel caps"
        )


def check_completion(completion: Completion, banned: frozenset[int]) -> None:
    """Every token is allowed and has one finite log-probability <= 0 and one version.

    Raises:
        BadSample: one has not.
    """
    tokens = len(completion.token_ids)
    if tokens == 0:
        raise BadSample("a completion without tokens")
    if found := banned.intersection(completion.token_ids):
        raise BadSample(f"banned tokens were sampled: {sorted(found)}")
    if len(completion.logprobs) != tokens:
        raise BadSample(f"{len(completion.logprobs)} log-probabilities for {tokens} tokens")
    if not all(math.isfinite(value) and value <= 0 for value in completion.logprobs):
        raise BadSample("a sampled token has no finite log-probability: the weights may hold NaN")
    ends = [0, *(span.end for span in completion.spans)]
    starts = [*(span.start for span in completion.spans), tokens]
    if ends != starts:
        raise BadSample(f"weight versions {completion.spans} do not cover tokens 0..{tokens}")


def _caption(completion: Completion) -> Caption:
    return Caption(
        text=completion.text.strip(),
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        spans=completion.spans,
        finish=completion.finish,
    )
