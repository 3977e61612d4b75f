"""Writes with a model that is served elsewhere, over an OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caprl_async.config import WriterConfig
from caprl_async.data.chat import escape_markup
from caprl_async.data.images import BadImage, media_type
from caprl_async.data.processor import timestamp
from caprl_async.endpoint.client import Client
from caprl_async.endpoint.protocol import Choice
from caprl_async.endpoint.server import EndpointError, Failure, Server
from caprl_async.engine.types import EngineDied, EngineStats
from caprl_async.types import Finish, ImageData, ImageRef
from caprl_async.writer.types import Ask, Text, Unwritten, WriterError, Written, draws
from caprl_async.writer.writer import Writer


class EndpointWriter(Writer):
    """One served model. Whether it sees images shows when it is shown one."""

    sees = True

    def __init__(self, client: Client, config: WriterConfig) -> None:
        self.revision = f"{client.server.url} {client.model}"
        self._client = client
        self._config = config

    @classmethod
    def load(cls, config: WriterConfig, key: str) -> EndpointWriter:
        """
        Raises:
            WriterError: the server does not answer, or the key or the model's name is missing.
        """
        try:
            server = Server(config.endpoint, f"{key}.endpoint")
            with server.client() as client:
                model = config.endpoint.model or server.only_model(client)
        except EndpointError as error:
            raise WriterError(str(error)) from error
        return cls(Client(server, model, config.endpoint), config)

    @property
    def died(self) -> EngineDied | None:
        """Never: a server that is away may come back."""
        return None

    async def write(self, asks: Sequence[Ask]) -> list[Written]:
        return list(await asyncio.gather(*map(self._one, asks)))

    def stats(self) -> EngineStats:
        return self._client.stats()

    def close(self) -> None:
        self._client.close()

    async def _one(self, ask: Ask) -> Written:
        try:
            body = await asyncio.to_thread(self._body, ask)
        except OSError as error:
            return Unwritten(f"{error.filename}: {error.strerror}", again=False)
        except BadImage as error:
            return Unwritten(str(error), again=False)
        found = await self._client.complete(body)
        if isinstance(found, Failure):
            return Unwritten(found.reason, found.again)
        drawn = draws(ask, self._config.temperature)
        if len(found) != drawn:
            return Unwritten(f"the server gave {len(found)} of {drawn} answers", again=True)
        if any(choice.message.content is None for choice in found):
            return Unwritten("the server's answer has no text (does the model think first?)", again=True)
        return tuple(map(_text, found)) * (ask.n // drawn)

    def _body(self, ask: Ask) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": escape_markup(ask.text)}]
        if ask.image is not None:
            content = [*_shown(ask.image), *content]
        body: dict[str, Any] = {
            "messages": [
                {"role": "user", "content": content if ask.image is not None else content[0]["text"]}
            ],
            "max_tokens": self._config.max_tokens,
            "temperature": self._config.temperature,
            "top_p": 1.0,
            "n": draws(ask, self._config.temperature),
        }
        return body if ask.seed is None else {**body, "seed": ask.seed % 2**31}


def _shown(image: ImageRef | ImageData) -> Iterator[dict[str, Any]]:
    """The parts of a turn that show it: one, or a picture behind the time of each frame."""
    times = [{"type": "text", "text": timestamp(time)} for time in image.times]
    pictures: Sequence[ImageRef | ImageData] = image.pictures
    for number, picture in enumerate(pictures):
        data = picture.data if isinstance(picture, ImageData) else Path(picture.path).read_bytes()
        url = f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"
        yield from times[number : number + 1]
        yield {"type": "image_url", "image_url": {"url": url}}


def _text(choice: Choice) -> Text:
    finish = Finish.LENGTH if choice.finish_reason == "length" else Finish.STOP
    return Text((choice.message.content or "").strip(), finish, None)
