"""A judge: captions and questions in, verdicts out. Usable alone:

questions = [Question(question_id="1", stem="What colour is the circle?", choices=("red", "blue"), answer=0)]
with Judge.load(JudgeConfig(model="my/judge")) as judge:
    rows = judge.ask(["A red circle.", "A circle."], questions)  # verdicts [caption][question]
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.engine.types import EngineDied, EngineStats
from caprl_async.judge.asker import Answerer, Asker, EngineAsker
from caprl_async.judge.cache import VerdictCache, verdict_key
from caprl_async.judge.verdicts import Asking
from caprl_async.types import Outcome, Question, Verdict


class Judge:
    """Answers questions from captions. Frozen: the same caption and question get the same verdict."""

    def __init__(self, asker: Asker, cache_size: int) -> None:
        self._asker = asker
        self.cache = VerdictCache(cache_size)

    @classmethod
    def on(cls, engine: Answerer, config: JudgeConfig, tokenizer: Any = None) -> Judge:
        """A judge on an engine that runs already; raises what `EngineAsker` raises."""
        return cls(EngineAsker(engine, config, tokenizer), config.cache_size)

    @classmethod
    def load(cls, config: JudgeConfig, seed: int = 0) -> Judge:
        """Starts an engine for `config.model`, which takes seconds to minutes, or finds `config.endpoint`.

        Raises:
            FileNotFoundError, PromptError, JudgeConfigError, EngineDied: see `EngineAsker.load` and
                `EndpointAsker.load`.
        """
        if config.endpoint.url:
            from caprl_async.judge.endpoint import EndpointAsker  # imports openai, which an engine needs not

            return cls(EndpointAsker.load(config), config.cache_size)
        return cls(EngineAsker.load(config, seed), config.cache_size)

    @property
    def mode(self) -> JudgeMode:
        """The way of scoring that is really used."""
        return self._asker.mode

    @property
    def note(self) -> str:
        """What the user should know of the way of scoring; empty: nothing."""
        return self._asker.note

    @property
    def died(self) -> EngineDied | None:
        """Why nothing can be judged any more, or None."""
        return self._asker.died

    def stats(self) -> EngineStats:
        """Counters since the start."""
        return self._asker.stats()

    def ask(
        self, captions: Sequence[str], questions: Sequence[Question], rotation: int = 0
    ) -> tuple[tuple[Verdict, ...], ...]:
        """`judge` for callers without an event loop."""
        return asyncio.run(self.judge(captions, questions, rotation))

    async def judge(
        self, captions: Sequence[str], questions: Sequence[Question], rotation: int = 0
    ) -> tuple[tuple[Verdict, ...], ...]:
        """Verdicts [caption][question] of one group: all captions meet the same option orders.

        All questions are submitted together, caption by caption, so that a caption is prefilled once. A
        question that cannot be answered is `unscorable`, with a reason; equal captions are asked about once.

        Raises:
            EngineDied: nothing can be judged any more.
        """
        plan = self._asker.plan(questions, rotation)
        askings = {i: planned for i, planned in enumerate(plan) if isinstance(planned, Asking)}
        keys = {
            (caption, i): verdict_key(self._asker.revision, asking, caption)
            for caption in dict.fromkeys(captions)
            for i, asking in askings.items()
        }
        verdicts = {key: verdict for key in keys.values() if (verdict := self.cache.get(key)) is not None}
        unknown = {place: key for place, key in keys.items() if key not in verdicts}
        answers = await self._asker.ask([(askings[i], caption) for caption, i in unknown])
        # Kept only whole: asked again, a group that was cut off shows afresh whether its judge answers.
        whole = all(verdict.outcome is not Outcome.JUDGE_DOWN for verdict in answers)
        for key, verdict in zip(unknown.values(), answers, strict=True):
            verdicts[key] = verdict
            if whole and verdict.outcome is Outcome.SCORED:
                self.cache.put(key, verdict)
        return tuple(
            tuple(p if isinstance(p, Verdict) else verdicts[keys[caption, i]] for i, p in enumerate(plan))
            for caption in captions
        )

    def close(self) -> None:
        """Ends the engine, or the connection to the endpoint."""
        self._asker.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
