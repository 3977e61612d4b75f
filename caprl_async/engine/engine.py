"""The one wrapper around vLLM: a thread that steps an `LLMEngine` and runs commands between its steps.

Rollouts hold one with the policy, judges one with a text model. Everything that touches the engine (requests,
aborts, weight updates, shutdown) happens on that thread, so an update never meets a half-done step.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from caprl_async.config import EngineConfig
from caprl_async.engine import translate
from caprl_async.engine.build import EngineSpec, VisionLimits, build
from caprl_async.engine.types import EngineDied, EngineStats, Request, RequestFailed, Response
from caprl_async.types import Version

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")
START = Version(0, 0)
_Outcomes = list[tuple[asyncio.Future[Any], Any]]  # what to set in whose future


@dataclass(frozen=True)
class _Add:
    id: str
    request: Request
    image: Any  # the decoded PIL image, if the request has one
    reply: asyncio.Future[Response]


@dataclass(frozen=True)
class _Abort:
    ids: tuple[str, ...]


@dataclass(frozen=True)
class _Call:
    function: Callable[[LLMEngine], Any]
    reply: asyncio.Future[Any]


@dataclass(frozen=True)
class _Close:
    pass


_Command = tuple[_Add, ...] | _Abort | _Call | _Close


class Engine:
    """A running vLLM engine. `generate`, `generate_many` and `call` may be awaited from any event loop."""

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        *,
        seed: int,
        vision: VisionLimits | None = None,
        weight_backend: str | None = None,
        banned_token_ids: tuple[int, ...] = (),
        logprobs_mode: str = "processed_logprobs",
        version: Version = START,
    ) -> None:
        """Blocks until the engine is ready (seconds to minutes).

        Raises:
            EngineDied: vLLM could not build it; the cause is attached.
        """
        spec = EngineSpec(model, config, seed, vision, weight_backend, banned_token_ids, logprobs_mode)
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._replies: dict[str, tuple[Request, asyncio.Future[Response]]] = {}
        self._settled: _Outcomes = []
        self._version = version
        self._died: EngineDied | None = None
        self._closing = False
        self._queued = 0
        self._busy_s = 0.0
        self._born = time.monotonic()
        self._sampled = self._prompted = self._cached = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(spec, ready), name="engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._died is not None:
            raise self._died

    # ------------------------------------------------------------ for callers

    async def generate(self, request: Request) -> Response:
        """All completions of one request. Cancelling the caller aborts the request.

        Raises:
            RequestFailed: this request cannot be answered.
            EngineDied: no request can be answered any more.
        """
        (answer,) = await self.generate_many([request])
        if isinstance(answer, RequestFailed):
            raise answer
        return answer

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]:
        """The same for many, handed to vLLM together; a failed request is a value in its place.

        Raises:
            EngineDied: no request can be answered any more.
        """
        loop = asyncio.get_running_loop()
        images = await asyncio.gather(*(_decoded(request) for request in requests), return_exceptions=True)
        answers: list[asyncio.Future[Response]] = []
        adds = []
        for request, image in zip(requests, images, strict=True):
            answer: asyncio.Future[Response] = loop.create_future()
            answers.append(answer)
            if isinstance(image, BaseException):
                answer.set_exception(image)
            else:
                adds.append(_Add(f"r{next(self._ids)}", request, image, answer))
        self._queued += len(adds)
        self._send(tuple(adds))
        try:
            outcomes = await asyncio.gather(*answers, return_exceptions=True)
        except asyncio.CancelledError:
            self._send(_Abort(tuple(add.id for add in adds)))
            raise
        return [_outcome(outcome) for outcome in outcomes]

    async def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Runs `function` on the engine's thread between two steps; the engine waits for it.

        Raises:
            EngineDied: the engine is gone. Any exception of `function` itself comes back as it is.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._send(_Call(function, answer))
        return await answer

    @property
    def version(self) -> Version:
        """Of the weights that sample now."""
        return self._version

    async def set_version(self, version: Version) -> None:
        """Names the current weights; tokens sampled from now on carry this version."""
        await self.call(lambda llm: llm.set_weight_version(str(version)))

    @property
    def died(self) -> EngineDied | None:
        """Why the engine cannot answer any more, or None."""
        return self._died

    def stats(self) -> EngineStats:
        """May be asked from any thread."""
        return EngineStats(
            busy_s=self._busy_s,
            alive_s=time.monotonic() - self._born,
            sampled_tokens=self._sampled,
            prompt_tokens=self._prompted,
            cached_tokens=self._cached,
            running=len(self._replies),
            waiting=max(0, self._queued),
        )

    def close(self) -> None:
        """Ends the engine; requests in it fail with EngineDied. Blocks until its thread is gone."""
        self._inbox.put(_Close())
        self._thread.join(timeout=60)

    def _send(self, command: _Command) -> None:
        if self._died is not None:
            raise EngineDied(str(self._died)) from self._died
        self._inbox.put(command)
        if self._died is not None:  # it died meanwhile and may have missed the command
            self._refuse_inbox()

    # ------------------------------------------------------------ the engine's thread

    def _live(self, spec: EngineSpec, ready: threading.Event) -> None:
        try:
            llm = build(spec)
            llm.set_weight_version(str(self._version))
        except BaseException as error:
            self._died = _death("cannot build the engine for " + spec.model, error)
            ready.set()
            return
        self._tokenizer = llm.get_tokenizer()
        self._born = time.monotonic()
        ready.set()
        try:
            while not self._closing:
                self._take_commands(llm)
                if not self._closing and llm.has_unfinished_requests():
                    self._step(llm)
            self._died = EngineDied("the engine was closed")
        except BaseException as error:
            self._died = _death("the engine died", error)
        for _, reply in self._replies.values():
            self._settle(reply, self._died)
        self._replies.clear()
        self._flush()
        self._refuse_inbox()
        llm.engine_core.shutdown()

    def _take_commands(self, llm: LLMEngine) -> None:
        """Runs what has been sent; with nothing to compute, waits for it."""
        block = not llm.has_unfinished_requests()
        while not self._closing:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                break
            block = False
            match command:
                case tuple():
                    self._add_all(llm, command)
                case _Abort(ids):
                    known = [i for i in ids if self._replies.pop(i, None) is not None]
                    llm.abort_request(known)
                case _Call(function, reply):
                    self._call(llm, function, reply)
                case _Close():
                    self._closing = True
        self._flush()

    def _add_all(self, llm: LLMEngine, adds: tuple[_Add, ...]) -> None:
        begun = time.monotonic()
        for add in adds:
            self._queued -= 1
            try:
                llm.add_request(
                    add.id, translate.prompt(llm, add.request, add.image), translate.params(add.request)
                )
                self._replies[add.id] = (add.request, add.reply)
            except Exception as error:  # vLLM checks a request before it takes it in: the rest are unharmed
                llm.abort_request([add.id])
                self._settle(add.reply, RequestFailed(f"{type(error).__name__}: {error}"))
        self._busy_s += time.monotonic() - begun

    def _call(self, llm: LLMEngine, function: Callable[[LLMEngine], Any], reply: asyncio.Future[Any]) -> None:
        try:
            result = function(llm)
        except Exception as error:
            result = error
        self._version = Version.parse(llm.get_weight_version())
        self._settle(reply, result)

    def _step(self, llm: LLMEngine) -> None:
        begun = time.monotonic()
        for output in llm.step():
            if not output.finished or output.request_id not in self._replies:
                continue
            request, reply = self._replies.pop(output.request_id)
            try:
                response = translate.response(request, output, self._tokenizer)
            except RequestFailed as failure:
                self._settle(reply, failure)
                continue
            self._sampled += sum(len(c.token_ids) for c in response.completions)
            self._prompted += len(response.prompt_token_ids)
            self._cached += response.cached_tokens
            self._settle(reply, response)
        self._flush()
        self._busy_s += time.monotonic() - begun

    # ------------------------------------------------------------ answers

    def _settle(self, reply: asyncio.Future[Any], outcome: Any) -> None:
        self._settled.append((reply, outcome))

    def _flush(self) -> None:
        outcomes, self._settled = self._settled, []
        _deliver(outcomes)

    def _refuse_inbox(self) -> None:
        """Fails every command that the dead engine will not run; any thread may do so."""
        refused: _Outcomes = []
        while True:
            try:
                command = self._inbox.get(block=False)
            except queue.Empty:
                break
            if isinstance(command, tuple):
                refused.extend((add.reply, self._died) for add in command)
            elif isinstance(command, _Call):
                refused.append((command.reply, self._died))
        _deliver(refused)


async def _decoded(request: Request) -> Any:
    """The request's pictures, read and decoded off the event loop; None without one.

    Raises:
        RequestFailed: it cannot be read.
    """
    if request.image is None:
        return None
    from caprl_async.data.processor import UnreadableImage, read_image

    try:
        pictures = request.image.pictures
        return await asyncio.to_thread(lambda: [read_image(picture) for picture in pictures])
    except UnreadableImage as error:
        raise RequestFailed(str(error)) from error


def _deliver(outcomes: _Outcomes) -> None:
    """Hands outcomes to the event loops that wait for them, one wake-up each; a closed loop waits no more."""
    by_loop: dict[asyncio.AbstractEventLoop, _Outcomes] = defaultdict(list)
    for future, outcome in outcomes:
        by_loop[future.get_loop()].append((future, outcome))
    for loop, ours in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_all, ours)


def _set_all(outcomes: _Outcomes) -> None:
    for future, outcome in outcomes:
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _outcome(outcome: Response | BaseException) -> Response | RequestFailed:
    if isinstance(outcome, Response | RequestFailed):
        return outcome
    raise outcome


def _death(what: str, cause: BaseException) -> EngineDied:
    death = EngineDied(f"{what}: {type(cause).__name__}: {cause}")
    death.__cause__ = cause
    return death
