"""Asks a judge that is served elsewhere, over any OpenAI-compatible API. No failure of it becomes a score.

`chat` says what is asked and what the answers mean, `server` where it is and what its failures mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from openai import APIStatusError, AsyncOpenAI, OpenAI

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.engine.engine import EngineStats
from caprl_async.engine.types import EngineDied
from caprl_async.judge import verdicts
from caprl_async.judge.chat import (
    ENDED,
    Choice,
    NoLogprobs,
    PromptTokens,
    Usage,
    Way,
    escape_markup,
    patience_s,
    read_choice,
    ways_to_ask,
)
from caprl_async.judge.server import FAULTS, Failure, Server
from caprl_async.judge.verdicts import Asking, Planned, no_answer, unscorable
from caprl_async.types import Question, Verdict

_OF_LOGPROBS = (400, 422, 501)  # what APIs without log-probabilities say when asked for them
_ASTRAY = 0.9  # of the trial answer's probability on no option: such a judge scores nothing
_TRIAL = Asking(Question(question_id="trial", stem="What is red?", choices=("circle", "star"), answer=0), ())

log = logging.getLogger(__name__)


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


class EndpointAsker:
    """Asks a served model. May be used from one event loop after another, as `asyncio.run` makes them."""

    died: EngineDied | None = None
    """Never: a server that is away may come back."""

    def __init__(self, server: Server, model: str, way: Way, note: str = "") -> None:
        """See `load`."""
        config = way.config
        self.mode = config.mode
        self.note = note
        self.model = model
        endpoint = config.endpoint
        asked = (config.mode.value, config.temperature, config.prompt, config.text_tokens, endpoint.prefill)
        content = msgspec.msgpack.encode((server.url, model, asked, getattr(way, "top", 0)))
        self.revision = hashlib.blake2b(content, digest_size=32).digest()
        self._server = server
        self._way = way
        self._endpoint = endpoint
        # The client's own limit is on silence, which a server that sends a byte now and then never keeps.
        self._patience_s = patience_s(endpoint)
        self._line: _Line | None = None
        self._meter = _Meter()

    @classmethod
    def load(cls, config: JudgeConfig) -> EndpointAsker:
        """Finds the model and asks a trial question, to learn whether the server gives log-probabilities.

        Without them mode `expected` becomes `sample`, and `note` says so.

        Raises:
            JudgeConfigError: mode, numbers or key do not suit, or the server does not answer.
            PromptError: a placeholder is missing in `config.prompt`.
        """
        ways = ways_to_ask(config)
        server = Server(config.endpoint)
        lacking = ""
        with server.client() as client:
            model = config.endpoint.model or server.only_model(client)
            for way in ways:
                try:
                    astray = _try_out(client, model, way)
                    break
                except FAULTS as error:
                    status = error.status_code if isinstance(error, APIStatusError) else None
                    meant = isinstance(error, NoLogprobs) or status in _OF_LOGPROBS
                    if not meant or way is ways[-1]:
                        asked = f"a trial question to judge.endpoint.model={model}"
                        raise server.refusal(error, asked) from None
                    lacking = lacking or server.failure(error).reason
        note = ""
        if way.config.mode is not config.mode:
            note = (
                f"judge.endpoint.url={server.url} gives no log-probabilities ({lacking}): judge.mode="
                f"{config.mode.value} became {way.config.mode.value}, with judge.draws={config.draws}"
            )
        if astray > _ASTRAY and way.config.mode is not JudgeMode.text:
            note += ("; " if note else "") + (
                f"a trial question to judge.endpoint.url={server.url} was answered by none of its options "
                f"({astray:.0%}): a model that thinks first or writes around its answer scores all captions 0"
            )
        if note:
            log.warning(note)
        return cls(server, model, way, note)

    def plan(self, questions: Sequence[Question], rotation: int) -> tuple[Planned, ...]:
        faults = [self._fault(question) for question in questions]
        return verdicts.plan_sound(questions, faults, lambda sound: self._way.arrange(sound, rotation))

    async def ask(self, askings: Sequence[tuple[Asking, str]]) -> list[Verdict]:
        line = self._line_here()
        bodies = [self._way.bodies(asking, caption) for asking, caption in askings]
        # A semaphore is fair: requests start in this order, so those of one caption meet its cached prefix.
        every = await asyncio.gather(*(self._send(line, body) for mine in bodies for body in mine))
        reasons = {one.reason if isinstance(one, Failure) else None for one in every}
        if len({caption for _, caption in askings}) > 1 and len(reasons) == 1 and None not in reasons:
            # Different captions, one refusal: it is not about them (an account without money says 400 too).
            every = [dataclasses.replace(one, again=True) for one in every if isinstance(one, Failure)]
        answers = iter(every)
        return [
            self._verdict(asking, [next(answers) for _ in mine])
            for (asking, _), mine in zip(askings, bodies, strict=True)
        ]

    def stats(self) -> EngineStats:
        """Of the requests; tokens as the server reports them."""
        return self._meter.stats()

    def close(self) -> None:
        line, self._line = self._line, None
        with contextlib.suppress(RuntimeError):  # its loop ends at this moment, and the sockets with it
            if line is not None and line.loop.is_running():
                asyncio.run_coroutine_threadsafe(line.client.close(), line.loop)

    def _fault(self, question: Question) -> str | None:
        options = [escape_markup(option) for option in verdicts.all_options(question, self._way.config)]
        shown = verdicts.words_fault if self.mode is JudgeMode.text else verdicts.letters_fault
        return shown(options) or verdicts.text_fault(question, options)

    def _line_here(self) -> _Line:
        loop = asyncio.get_running_loop()
        if self._line is None or self._line.loop is not loop:
            places = asyncio.Semaphore(self._endpoint.max_in_flight)
            self._line = _Line(loop, self._server.async_client(), places)
        return self._line

    async def _send(self, line: _Line, body: dict[str, Any]) -> Choice | Failure:
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
            choice, usage = read_choice(content)
        except FAULTS as error:
            return self._server.failure(error)
        finally:
            line.places.release()
        self._meter.count(usage)
        if choice.finish_reason == "content_filter":
            return Failure("the server's content filter held the answer back", again=False)
        if choice.finish_reason not in ENDED:
            return Failure(f"the server ended its answer by {choice.finish_reason!r}"[:300], again=True)
        return choice

    def _verdict(self, asking: Asking, answers: Sequence[Choice | Failure]) -> Verdict:
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        failure = next((one for one in failures if one.again), failures[0] if failures else None)
        if failure is None:
            try:
                return self._way.verdict(asking, [one for one in answers if isinstance(one, Choice)])
            except ValueError as error:
                failure = Failure(str(error), again=True)
        if not failure.again:
            return unscorable(asking.question, f"the judge's endpoint refused the prompt: {failure.reason}")
        return no_answer(asking.question, failure.reason)


def _try_out(client: OpenAI, model: str, way: Way) -> float:
    """The share of the answer on none of the options, if the server can be asked so; else raises a FAULT."""
    options = verdicts.all_options(_TRIAL.question, way.config)
    asking = dataclasses.replace(_TRIAL, options=options, orders=(tuple(range(len(options))),), seeds=(0,))
    (body,) = way.bodies(asking, "A red circle.")
    content = client.chat.completions.with_raw_response.create(model=model, **body).content
    return way.verdict(asking, [read_choice(content)[0]]).off_options or 0.0
