"""A judge: one engine that holds a text-only model, asked about captions. Usable alone:

judge = Judge.load(JudgeConfig(model="my/judge", mode=JudgeMode.expected))
verdicts = asyncio.run(judge.judge(["A red circle."], questions))  # [caption][question]
judge.close()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from caprl_async.config import JudgeConfig
from caprl_async.engine.types import Request, RequestFailed, Response
from caprl_async.judge.cache import VerdictCache, judge_revision, verdict_key
from caprl_async.judge.modes import Asking, make_mode, unscorable
from caprl_async.judge.prompt import JudgePrompter, load_tokenizer
from caprl_async.types import Outcome, Question, Verdict

if TYPE_CHECKING:
    from caprl_async.engine.engine import EngineStats


class Answerer(Protocol):
    """What a judge needs of an engine; `engine.engine.Engine` is one."""

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Judge:
    """Answers questions from captions. Frozen: the same caption and question get the same verdict."""

    def __init__(self, engine: Answerer, config: JudgeConfig, tokenizer: Any = None) -> None:
        """`tokenizer` is that of `config.model` unless given.

        Raises:
            FileNotFoundError: `config.model` is no folder.
            PromptError, JudgeConfigError: prompt, tokenizer and mode do not fit together.
        """
        self.engine = engine
        self.cache = VerdictCache(config.cache_size)
        self._config = config
        self._revision = judge_revision(config)
        self._mode = make_mode(
            JudgePrompter(tokenizer or load_tokenizer(config.model), config.prompt), config
        )

    @classmethod
    def load(cls, config: JudgeConfig, seed: int = 0) -> Judge:
        """Starts an engine for `config.model`; takes seconds to minutes.

        Raises:
            EngineDied: vLLM cannot load the model; and what the constructor raises.
        """
        from caprl_async.engine.engine import Engine

        judge_revision(config)  # first what is quick and says more clearly what is wrong
        tokenizer = load_tokenizer(config.model)
        make_mode(JudgePrompter(tokenizer, config.prompt), config)
        return cls(Engine(config.model, config.engine, seed=seed), config, tokenizer)

    async def judge(
        self, captions: Sequence[str], questions: Sequence[Question], rotation: int = 0
    ) -> tuple[tuple[Verdict, ...], ...]:
        """Verdicts [caption][question] of one group: all captions meet the same option orders.

        All questions are submitted together, caption by caption, so that a caption is prefilled once. A
        question that cannot be answered is `unscorable`, with a reason; equal captions are asked about once.

        Raises:
            EngineDied: nothing can be judged any more.
        """
        plan = self._mode.plan(questions, rotation)
        askings = {i: planned for i, planned in enumerate(plan) if isinstance(planned, Asking)}
        keys = {
            (caption, i): verdict_key(self._revision, asking, caption)
            for caption in dict.fromkeys(captions)
            for i, asking in askings.items()
        }
        verdicts = {key: verdict for key in keys.values() if (verdict := self.cache.get(key)) is not None}
        unknown = {place: key for place, key in keys.items() if key not in verdicts}
        answers = await self._ask([(askings[i], caption) for caption, i in unknown])
        for key, verdict in zip(unknown.values(), answers, strict=True):
            verdicts[key] = verdict
            if verdict.outcome is Outcome.SCORED:
                self.cache.put(key, verdict)
        return tuple(
            tuple(p if isinstance(p, Verdict) else verdicts[keys[caption, i]] for i, p in enumerate(plan))
            for caption in captions
        )

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    async def _ask(self, askings: Sequence[tuple[Asking, str]]) -> list[Verdict]:
        """Puts questions to the engine, all at once, each with its caption."""
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

    def _verdict(self, asking: Asking, answers: Sequence[Response | RequestFailed]) -> Verdict:
        responses = []
        for answer in answers:
            if isinstance(answer, Response):
                responses.append(answer)
            elif answer.again:
                return Verdict(
                    question_id=asking.question.question_id, outcome=Outcome.JUDGE_DOWN, reason=str(answer)
                )
            else:
                return unscorable(asking.question, f"the judge's engine refused the prompt: {answer}")
        return self._mode.verdict(asking, responses)

    def _too_long(self, requests: Sequence[Request]) -> str | None:
        needed = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
        limit = self._config.engine.max_model_len
        if needed <= limit:
            return None
        return f"prompt and answer take {needed} tokens, judge.engine.max_model_len is {limit}"
