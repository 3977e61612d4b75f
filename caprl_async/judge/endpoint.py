"""Asks a judge that is served elsewhere, over any OpenAI-compatible API. No failure of it becomes a score.

`chat` says what is asked and what the answers mean; the room `endpoint` sends it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
from collections.abc import Sequence

import msgspec
from openai import APIStatusError, OpenAI

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.data.chat import escape_markup
from caprl_async.endpoint.client import Client
from caprl_async.endpoint.protocol import Choice, read_choices
from caprl_async.endpoint.server import FAULTS, EndpointError, Failure, Server
from caprl_async.engine.types import EngineDied, EngineStats
from caprl_async.judge import verdicts
from caprl_async.judge.chat import NoLogprobs, Way, ways_to_ask
from caprl_async.judge.verdicts import Asking, JudgeConfigError, Planned, no_answer, unscorable
from caprl_async.types import Question, Verdict

_OF_LOGPROBS = (400, 422, 501)  # what APIs without log-probabilities say when asked for them
_ASTRAY = 0.9  # of the trial answer's probability on no option: such a judge scores nothing
_TRIAL = Asking(Question(question_id="trial", stem="What is red?", choices=("circle", "star"), answer=0), ())

log = logging.getLogger(__name__)


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
        self._client = Client(server, model, endpoint)
        self._way = way

    @classmethod
    def load(cls, config: JudgeConfig) -> EndpointAsker:
        """Finds the model and asks a trial question, to learn whether the server gives log-probabilities.

        Without them mode `expected` becomes `sample`, and `note` says so.

        Raises:
            JudgeConfigError: mode, numbers or key do not suit, or the server does not answer.
            PromptError: a placeholder is missing in `config.prompt`.
        """
        try:
            return cls._found(config, ways_to_ask(config))
        except EndpointError as error:
            raise JudgeConfigError(str(error)) from error

    @classmethod
    def _found(cls, config: JudgeConfig, ways: Sequence[Way]) -> EndpointAsker:
        server = Server(config.endpoint, "judge.endpoint")
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
        bodies = [self._way.bodies(asking, caption) for asking, caption in askings]
        # Requests start in this order, so those of one caption meet its cached prefix.
        every = await asyncio.gather(*(self._client.complete(body) for mine in bodies for body in mine))
        reasons = {one.reason if isinstance(one, Failure) else None for one in every}
        if len({caption for _, caption in askings}) > 1 and len(reasons) == 1 and None not in reasons:
            # Different captions, one refusal: it is not about them (an account without money says 400 too).
            every = [dataclasses.replace(one, again=True) for one in every if isinstance(one, Failure)]
        answers = iter(every)
        return [
            self._verdict(
                asking, [one if isinstance(one := next(answers), Failure) else one[0] for _ in mine]
            )
            for (asking, _), mine in zip(askings, bodies, strict=True)
        ]

    def stats(self) -> EngineStats:
        """Of the requests; tokens as the server reports them."""
        return self._client.stats()

    def close(self) -> None:
        self._client.close()

    def _fault(self, question: Question) -> str | None:
        options = [escape_markup(option) for option in verdicts.all_options(question, self._way.config)]
        shown = verdicts.words_fault if self.mode is JudgeMode.text else verdicts.letters_fault
        return shown(options) or verdicts.text_fault(question, options)

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
    return way.verdict(asking, read_choices(content)[0][:1]).off_options or 0.0
