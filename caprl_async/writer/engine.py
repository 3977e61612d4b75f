"""Writes with a vLLM engine of ours, by token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caprl_async.config import WriterConfig
from caprl_async.data.chat import ChatEncoder, NoChatTemplate, load_tokenizer
from caprl_async.data.processor import PolicyProcessor, UnsupportedModel
from caprl_async.engine.build import VisionLimits
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import Completion, EngineDied, EngineStats, Request, RequestFailed, Response
from caprl_async.writer.types import Ask, Text, Unwritten, WriterError, Written, draws
from caprl_async.writer.writer import Writer

_KEPT_ENCODERS = 64  # videos of equal lengths have equal times


class EngineWriter(Writer):
    """One engine, with its checkpoint's chat template; it sees images if the checkpoint does."""

    def __init__(self, engine: Engine, prompts: Prompts, config: WriterConfig) -> None:
        """See `load`."""
        self.engine = engine
        self.sees = prompts.sees
        self.revision = config.model
        self._prompts = prompts
        self._config = config

    @classmethod
    def load(cls, config: WriterConfig, key: str, seed: int, pictures: int = 1) -> EngineWriter:
        """
        Raises:
            WriterError: the checkpoint's files do not suit.
            EngineDied: vLLM cannot load it.
        """
        prompts = Prompts(config, key)
        vision = VisionLimits(config.min_pixels, config.max_pixels, pictures) if prompts.sees else None
        engine = Engine(
            config.model, config.engine, seed=seed, vision=vision, banned_token_ids=prompts.banned_token_ids
        )
        return cls(engine, prompts, config)

    @property
    def died(self) -> EngineDied | None:
        return self.engine.died

    async def write(self, asks: Sequence[Ask]) -> list[Written]:
        requests = [self._request(ask) for ask in asks]
        sent = [request for request in requests if isinstance(request, Request)]
        answers = iter(await self.engine.generate_many(sent) if sent else [])
        return [
            request if isinstance(request, Unwritten) else self._written(next(answers), ask)
            for ask, request in zip(asks, requests, strict=True)
        ]

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        self.engine.close()

    def _request(self, ask: Ask) -> Request | Unwritten:
        config = self._config
        if ask.image is not None and not self.sees:
            return Unwritten(f"{config.model} cannot see images", again=False)
        ids = self._prompts.ids(ask)
        room, limit = len(ids) + config.max_tokens, config.engine.max_model_len
        if room > limit:
            return Unwritten(
                f"prompt and answer take {room} tokens, engine.max_model_len={limit}", again=False
            )
        return Request(
            ids, image=ask.image, n=draws(ask, config.temperature), temperature=config.temperature,
            max_tokens=config.max_tokens, seed=ask.seed,
        )  # fmt: skip

    def _written(self, answer: Response | RequestFailed, ask: Ask) -> Written:
        if isinstance(answer, RequestFailed):
            return Unwritten(str(answer), again=answer.again)
        texts = tuple(self._text(completion) for completion in answer.completions)
        return texts * (ask.n // len(texts))

    def _text(self, completion: Completion) -> Text:
        text = self._prompts.decode(completion.token_ids).strip()
        return Text(text, completion.finish, len(completion.token_ids))


class Prompts:
    """From asks to token ids, and back, for one checkpoint."""

    def __init__(self, config: WriterConfig, key: str) -> None:
        """
        Raises:
            WriterError: there is no such folder, or no chat template that suits.
        """
        if not (Path(config.model) / "config.json").is_file():
            raise WriterError(f"{key}.model={config.model} is no folder of a checkpoint")
        try:
            self._processor = self._vision(config)
            self._plain = ChatEncoder(self._tokenizer)
        except (NoChatTemplate, UnsupportedModel) as error:
            raise WriterError(f"{key}.model={config.model}: {error}") from error
        self.sees = self._processor is not None

    def ids(self, ask: Ask) -> tuple[int, ...]:
        """Of a user turn up to the answer; a placeholder for an image, or for each frame, behind its time."""
        if ask.image is None or self._processor is None:
            return self._plain.ids(ask.text)
        return self._showing(ask.image.times).ids(ask.text)

    def _showing(self, times: tuple[float, ...]) -> ChatEncoder:
        """The encoder of turns with an image, or with frames of these times."""
        if times not in self._encoders:
            assert self._processor is not None
            processor = self._processor
            while len(self._encoders) >= _KEPT_ENCODERS:
                self._encoders.pop(next(iter(self._encoders)))
            self._encoders[times] = ChatEncoder(
                processor.tokenizer, lambda text: processor.render(text, times)
            )
        return self._encoders[times]

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text up to its end."""
        return self._plain.decode(ids)

    def _vision(self, config: WriterConfig) -> PolicyProcessor | None:
        """The processor of a checkpoint that sees images; None if it sees none."""
        from transformers import AutoConfig

        self._encoders: dict[tuple[float, ...], ChatEncoder] = {}
        self.banned_token_ids: tuple[int, ...] = ()
        if getattr(AutoConfig.from_pretrained(config.model), "vision_config", None) is None:
            self._tokenizer: Any = load_tokenizer(config.model)
            return None
        processor = PolicyProcessor(config.model, config.min_pixels, config.max_pixels)
        self._tokenizer = processor.tokenizer
        self.banned_token_ids = processor.banned_token_ids
        self._encoders[()] = ChatEncoder(processor.tokenizer, processor.render)
        return processor
