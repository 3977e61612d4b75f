"""A chat-completions answer, as far as it is read, and how long one is waited for. Free of clients."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from caprl_async.config import EndpointConfig

_PAUSE_S = 8.0  # the client's longest pause between two tries, unless the server asks for more


def patience_s(endpoint: EndpointConfig) -> float:
    """Seconds that one request may take, all its tries and the pauses between them included."""
    return (endpoint.retries + 1) * endpoint.timeout_s + endpoint.retries * _PAUSE_S


def url_problems(url: str, key: str) -> Iterator[str]:
    """What is wrong with `url`, a sentence each; `key` is where the conf has it, as "checker.endpoint"."""
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may show a password
        yield f"{key}.url cannot be read: an IPv6 address without its brackets, or letters that no host has"
        return
    if parts.username or parts.password or parts.query or parts.fragment:
        yield (
            f"{key}.url must hold no user, password or query, which would be shown wherever the url is; give "
            f"the key by {key}.api_key_env"
        )
    elif parts.scheme not in ("http", "https") or not parts.hostname:
        yield f"{key}.url={url} must begin with http:// or https:// and name a host"


class Token(msgspec.Struct):
    token: str
    logprob: float


class Position(msgspec.Struct):
    top_logprobs: list[Token] | None = None


class Logprobs(msgspec.Struct):
    content: list[Position] | None = None  # one per token of the answer


class Message(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Message
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class PromptTokens(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokens | None = None


class Reply(msgspec.Struct):
    choices: list[Choice]
    usage: Usage | None = None


def read_choices(content: bytes) -> tuple[list[Choice], Usage]:
    """The choices of an answer, at least one, and the tokens that they took.

    Raises:
        ValueError: there is none.
    """
    try:
        reply = msgspec.json.decode(content, type=Reply)
    except ValueError as error:
        raise ValueError(f"the server's answer cannot be read: {error}") from None
    if not reply.choices:
        raise ValueError("the server's answer has no choices")
    return reply.choices, reply.usage or Usage()
