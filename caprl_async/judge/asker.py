"""What a judge needs of whoever answers: plans questions, asks them all at once, turns answers into verdicts.

`EngineAsker` asks an engine of ours; `endpoint.EndpointAsker` asks a served model over HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.data.chat import load_tokenizer
from caprl_async.engine.types import EngineDied, EngineStats, Request, RequestFailed, Response
from caprl_async.judge.cache import judge_revision
from caprl_async.judge.modes import make_mode
from caprl_async.judge.prompt import JudgePrompter
from caprl_async.judge.verdicts import Asking, Planned, no_answer, unscorable
from caprl_async.types import Question, Verdict


class Asker(Protocol):
    """One way to reach a judge's model."""

    revision: bytes
    """Digest of everything but caption and question that a verdict depends on."""
    mode: JudgeMode
    """The way of scoring that is really used."""
    note: str
    """What the user should know of it; empty: nothing."""

    @property
    def died(self) -> EngineDied | None:
        """Why nothing can be answered any more, or None."""

    def plan(self, questions: Sequence[Question], rotation: int) -> tuple[Planned, ...]:
        """What is asked of every caption of a group, in the order of `questions`."""

    async def ask(self, askings: Sequence[tuple[Asking, str]]) -> list[Verdict]:
        """Verdicts on (question, caption) pairs; pairs of one caption stand together.

        Raises:
            EngineDied: nothing can be answered any more.
        """

    def stats(self) -> EngineStats:
        """Counters since the start; of an endpoint its share that is known."""

    def close(self) -> None:
        """Ends what was started."""


class Answerer(Protocol):
    """What `EngineAsker` needs of an engine; `engine.engine.Engine` is one."""

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class EngineAsker:
    """Asks a vLLM engine of ours, by token ids."""

    def __init__(self, engine: Answerer, config: JudgeConfig, tokenizer: Any = None) -> None:
        """`tokenizer` is that of `config.model` unless given.

        Raises:
            FileNotFoundError: `config.model` is no folder.
            PromptError, JudgeConfigError: prompt, tokenizer and mode do not fit together.
        """
        self.engine = engine
        self.revision = judge_revision(config)
        self.mode = config.mode
        self.note = ""
        self._config = config
        self._mode = make_mode(
            JudgePrompter(tokenizer or load_tokenizer(config.model), config.prompt), config
        )

    @classmethod
    def load(cls, config: JudgeConfig, seed: int) -> EngineAsker:
        """Starts an engine for `config.model`; takes seconds to minutes.

        Raises:
            EngineDied: vLLM cannot load the model; and what the constructor raises.
        """
        from caprl_async.engine.engine import Engine

        judge_revision(config)  # first what is quick and says more clearly what is wrong
        tokenizer = load_tokenizer(config.model)
        make_mode(JudgePrompter(tokenizer, config.prompt), config)
        return cls(Engine(config.model, config.engine, seed=seed), config, tokenizer)

    @property
    def died(self) -> EngineDied | None:
        return getattr(self.engine, "died", None)

    def plan(self, questions: Sequence[Question], rotation: int) -> tuple[Planned, ...]:
        return self._mode.plan(questions, rotation)

    async def ask(self, askings: Sequence[tuple[Asking, str]]) -> list[Verdict]:
        requests = [self._mode.requests(asking, caption) for asking, caption in askings]
        faults = [self._too_long(mine) for mine in requests]
        sent = [r for mine, fault in zip(requests, faults, strict=True) if fault is None for r in mine]
        answers = iter(await self.engine.generate_many(sent) if sent else [])
        return [
            self._verdict(asking, [next(answers) for _ in mine])
            if fault is None
            else unscorable(asking.question, fault)
            for (asking, _), mine, fault in zip(askings, requests, faults, strict=True)
        ]

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        self.engine.close()

    def _verdict(self, asking: Asking, answers: Sequence[Response | RequestFailed]) -> Verdict:
        responses = []
        for answer in answers:
            if isinstance(answer, Response):
                responses.append(answer)
            elif answer.again:
                return no_answer(asking.question, str(answer))
            else:
                return unscorable(asking.question, f"the judge's engine refused the prompt: {answer}")
        return self._mode.verdict(asking, responses)

    def _too_long(self, requests: Sequence[Request]) -> str | None:
        needed = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
        limit = self._config.engine.max_model_len
        if needed <= limit:
            return None
        return f"prompt and answer take {needed} tokens, judge.engine.max_model_len is {limit}"
