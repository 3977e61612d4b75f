"""Sends requests to a served model: so many at one time, each with its patience; a failure is a value."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from caprl_async.config import EndpointConfig
from caprl_async.endpoint.protocol import Choice, PromptTokens, Usage, patience_s, read_choices
from caprl_async.endpoint.server import FAULTS, Failure, Server
from caprl_async.engine.types import EngineStats

_ENDED = (None, "stop", "length")  # how an answer may end that is an answer


class _Meter:
    """Counts what `EngineStats` tells."""

    def __init__(self) -> None:
        self.running = self.waiting = self.sampled = self.prompted = self.cached = 0
        self._born = self._since = time.monotonic()
        self._busy_s = 0.0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        if not self.running:
            self._since = time.monotonic()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._busy_s += time.monotonic() - self._since

    def count(self, usage: Usage) -> None:
        self.sampled += usage.completion_tokens or 0
        self.prompted += usage.prompt_tokens or 0
        self.cached += (usage.prompt_tokens_details or PromptTokens()).cached_tokens or 0

    def stats(self) -> EngineStats:
        now = time.monotonic()
        return EngineStats(
            busy_s=self._busy_s + (now - self._since if self.running else 0.0),
            alive_s=now - self._born,
            sampled_tokens=self.sampled,
            prompt_tokens=self.prompted,
            cached_tokens=self.cached,
            running=self.running,
            waiting=self.waiting,
        )


@dataclass(frozen=True)
class _Line:
    """A client and its places, which belong to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: AsyncOpenAI
    places: asyncio.Semaphore


class Client:
    """Of one served model. May be used from one event loop after another, as `asyncio.run` makes them."""

    def __init__(self, server: Server, model: str, config: EndpointConfig) -> None:
        self.server = server
        self.model = model
        self._config = config
        # The client's own limit is on silence, which a server that sends a byte now and then never keeps.
        self._patience_s = patience_s(config)
        self._line: _Line | None = None
        self._meter = _Meter()

    async def complete(self, body: dict[str, Any]) -> list[Choice] | Failure:
        """The choices of one chat completion, or why there are none; requests start in the order of calls."""
        line = self._line_here()
        self._meter.waiting += 1
        try:
            await line.places.acquire()
        finally:
            self._meter.waiting -= 1
        try:
            with self._meter.request():
                async with asyncio.timeout(self._patience_s):
                    create = line.client.chat.completions.with_raw_response.create
                    content = (await create(model=self.model, **body)).content
            choices, usage = read_choices(content)
        except FAULTS as error:
            return self.server.failure(error)
        finally:
            line.places.release()
        self._meter.count(usage)
        for choice in choices:
            if choice.finish_reason == "content_filter":
                return Failure("the server's content filter held the answer back", again=False)
            if choice.finish_reason not in _ENDED:
                return Failure(f"the server ended its answer by {choice.finish_reason!r}"[:300], again=True)
        return choices

    def stats(self) -> EngineStats:
        """Of the requests; tokens as the server reports them."""
        return self._meter.stats()

    def close(self) -> None:
        """Ends the connections."""
        line, self._line = self._line, None
        with contextlib.suppress(RuntimeError):  # its loop ends at this moment, and the sockets with it
            if line is not None and line.loop.is_running():
                asyncio.run_coroutine_threadsafe(line.client.close(), line.loop)

    def _line_here(self) -> _Line:
        loop = asyncio.get_running_loop()
        if self._line is None or self._line.loop is not loop:
            places = asyncio.Semaphore(self._config.max_in_flight)
            self._line = _Line(loop, self.server.async_client(), places)
        return self._line
