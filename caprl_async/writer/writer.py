"""A model that writes: by an engine of ours, or served elsewhere. Usable alone:

with load_writer(WriterConfig(model="my/model"), "answerer") as writer:
    (answer,) = writer.ask([Ask("What is red and round?")])
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from caprl_async.config import WriterConfig
from caprl_async.engine.types import EngineDied, EngineStats
from caprl_async.writer.types import Ask, Written


class Writer(ABC):
    """Answers asks, many at one time; what cannot be answered costs no other."""

    sees: bool
    """Whether it can be shown images."""

    revision: str
    """What its texts depend on besides the ask, for the record: the model, and a digest of its files."""

    @abstractmethod
    async def write(self, asks: Sequence[Ask]) -> list[Written]:
        """The answers, in the order of `asks`.

        Raises:
            EngineDied: nothing can be answered any more.
        """

    @property
    @abstractmethod
    def died(self) -> EngineDied | None:
        """Why nothing can be answered any more, or None."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Counters since the start."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine, or the connections."""

    def ask(self, asks: Sequence[Ask]) -> list[Written]:
        """`write` for callers without an event loop."""
        return asyncio.run(self.write(asks))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def model_name(config: WriterConfig) -> str:
    """Which model it is, for the record."""
    return config.endpoint.model or config.endpoint.url or config.model


def about_writer(config: WriterConfig) -> dict[str, Any]:
    """What a model's answers depend on beside what it is asked."""
    return {
        "model": model_name(config),
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }


def load_writer(config: WriterConfig, key: str, seed: int = 0, *, pictures: int = 1) -> Writer:
    """Starts an engine for `config.model`, which takes seconds to minutes, or finds `config.endpoint`.

    `key` is that of the conf which holds `config`; messages name it. `pictures`: the most that an ask shows.

    Raises:
        WriterError: model or endpoint cannot be used.
        EngineDied: vLLM cannot load the model.
    """
    if config.endpoint.url:
        from caprl_async.writer.endpoint import EndpointWriter  # imports openai, which an engine needs not

        return EndpointWriter.load(config, key)
    from caprl_async.writer.engine import EngineWriter

    return EngineWriter.load(config, key, seed, pictures)
