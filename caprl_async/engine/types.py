"""What goes into and comes out of an engine; free of vLLM, so that every room can speak of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from caprl_async.types import Finish, ImageData, ImageRef, VersionSpan


@dataclass(frozen=True)
class Request:
    """One prompt for the engine.

    With `logprob_token_ids` set, the completion's `chosen_logprobs` holds the log-probability of each of
    these tokens at the *first* generated position.
    """

    prompt_token_ids: tuple[int, ...]  # one placeholder per image, not expanded
    image: ImageRef | ImageData | None = None
    n: int = 1
    temperature: float = 1.0
    max_tokens: int = 1
    min_tokens: int = 0
    seed: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    want_logprobs: bool = False  # the sampled tokens' own processed log-probabilities


@dataclass(frozen=True)
class Completion:
    """One of the n answers."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    spans: tuple[VersionSpan, ...]
    logprobs: tuple[float, ...] = ()  # per token, if wanted
    chosen_logprobs: dict[int, float] = field(default_factory=dict)  # token id -> log-probability


@dataclass(frozen=True)
class Response:
    """All answers to one request."""

    prompt_token_ids: tuple[int, ...]  # image placeholders expanded
    completions: tuple[Completion, ...]
    cached_tokens: int  # of the prompt, served from the prefix cache


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was ready, and its load now."""

    busy_s: float  # spent in steps and in taking requests in
    alive_s: float
    sampled_tokens: int
    prompt_tokens: int
    cached_tokens: int  # of the prompt tokens: served from the prefix cache
    running: int  # requests inside vLLM
    waiting: int  # requests not yet handed to vLLM


class EngineDied(RuntimeError):
    """The engine cannot answer any more; the actor that holds it must end."""


class RequestFailed(RuntimeError):
    """This one request cannot be answered (too long, unreadable image); the engine goes on.

    With `again` the fault is not in the request: it may be answered if it is asked again.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again
