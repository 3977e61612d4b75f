"""The hub's counterparts: `Peer` for rollouts and judges, `LearnerPeer` for learner ranks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from caprl_async.replay.transport import HubAddress, connect, decode_hub, encode
from caprl_async.types import (
    Ack,
    BatchReply,
    BatchRequest,
    Credit,
    Generated,
    GenerateLease,
    Hello,
    Holding,
    Judged,
    JudgeLease,
    Revoke,
    TrainBatch,
    Version,
)

_BEAT_S = 0.5  # Hello and Credit at least this often
_RESEND_S = 1.0  # an answer without an acknowledgement, a request without a reply

Lease = GenerateLease | JudgeLease
Answer = Generated | Judged
Handle = Callable[[Any], Awaitable[Answer]]


class Peer:
    """One rollout or judge at the hub. All its leases run at the same time, in one event loop.

    Every lease gets exactly one answer, which is resent until the hub has journalled it.
    """

    def __init__(self, address: HubAddress, hello: Hello) -> None:
        self.dropped = 0  # messages that could not be decoded
        self._hello = encode(hello)
        self._address = address
        self._identity = f"{hello.name}/{hello.incarnation}"
        self._context = zmq.asyncio.Context()
        self._socket: Any = None
        self._running: dict[int, asyncio.Future[Answer]] = {}
        self._unacked: dict[int, tuple[float, bytes]] = {}  # lease -> when sent, answer
        self._holds: dict[int, Holding] = {}  # of all of these
        self._serving: asyncio.Task[Any] | None = None
        self._news = asyncio.Event()

    def move(self, address: HubAddress) -> None:
        """The hub has come up elsewhere. Call it in the loop that serves."""
        if self._socket is not None and address.endpoint != self._address.endpoint:
            self._socket.disconnect(self._address.endpoint)
            self._socket.connect(address.endpoint)
        self._address = address

    def announce(self) -> None:
        """Sends the next Credit now: its fields have changed. Call it in the loop that serves."""
        self._news.set()

    async def serve(self, handle: Handle, max_in_flight: int, stats: Callable[[], dict[str, Any]]) -> None:
        """Works until `close`. `handle(lease)` returns the answer; its exception becomes a `failure`.

        `stats()` gives Credit's other fields; what it raises ends the serving and is raised here.
        """
        self._socket = connect(self._context, self._address, self._identity)
        self._serving = asyncio.current_task()

        async def credit() -> None:
            holds = tuple(self._holds.values())
            await self._socket.send(encode(Credit(slots=max_in_flight, holds=holds, **stats())))

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._beat(credit))
                async for lease in self._leases():
                    running: asyncio.Future[Answer] = asyncio.ensure_future(handle(lease))
                    self._running[lease.lease] = running
                    self._holds[lease.lease] = _holding(lease)
                    group.create_task(self._finish(lease, running, credit))
        finally:
            for unfinished in self._running.values():
                unfinished.cancel()
            self._context.destroy(linger=0)

    async def close(self) -> None:
        """Ends `serve` and cancels what is running; the hub leases it to others."""
        serving = self._serving
        if serving is not None and not serving.done():
            serving.cancel()
            await asyncio.wait([serving, *self._running.values()])
        self._context.destroy(linger=0)

    async def _beat(self, credit: Callable[[], Awaitable[None]]) -> None:
        while True:
            # The hub may have restarted or have given this peer up: Hello is harmless when it has not.
            await self._socket.send(self._hello)
            await credit()
            now = time.monotonic()
            for lease, (sent, data) in list(self._unacked.items()):
                if now - sent >= _RESEND_S:
                    self._unacked[lease] = (now, data)
                    await self._socket.send(data)
            with suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_S):  # wait_for may swallow a cancellation
                    await self._news.wait()
            self._news.clear()

    async def _leases(self) -> AsyncIterator[Lease]:
        """New leases; acknowledgements and revocations are dealt with on the way."""
        while True:
            match decode_hub(await self._socket.recv()):
                case GenerateLease() | JudgeLease() as lease:
                    if lease.lease not in self._running and lease.lease not in self._unacked:
                        yield lease
                case Ack(lease=number):
                    self._unacked.pop(number, None)
                    self._holds.pop(number, None)
                case Revoke(lease=number):
                    await self._revoke(number)
                case _:
                    self.dropped += 1

    async def _finish(
        self, lease: Lease, running: asyncio.Future[Answer], credit: Callable[[], Awaitable[None]]
    ) -> None:
        await asyncio.wait([running])
        if running.cancelled():
            answer = _failure(lease, "revoked")
        elif (error := running.exception()) is not None:
            answer = _failure(lease, f"{type(error).__name__}: {error}")
        else:
            answer = running.result()
        del self._running[lease.lease]
        await self._answer(lease.lease, answer)
        await credit()

    async def _answer(self, lease: int, answer: Answer) -> None:
        data = encode(answer)
        self._unacked[lease] = (time.monotonic(), data)
        await self._socket.send(data)

    async def _revoke(self, lease: int) -> None:
        if lease in self._running:
            self._running[lease].cancel()
        elif lease not in self._unacked:
            # It never arrived or was answered long ago; the hub must not wait for it.
            await self._answer(lease, Judged(lease=lease, failure="revoked"))


def _holding(lease: Lease) -> Holding:
    if isinstance(lease, GenerateLease):
        return Holding(lease.lease, lease.prompt.key, lease.prompt.attempt)
    return Holding(lease.lease, lease.key, lease.attempt)


def _failure(lease: Lease, text: str) -> Answer:
    if isinstance(lease, GenerateLease):
        return Generated(lease=lease.lease, failure=text)
    return Judged(lease=lease.lease, failure=text)


class LearnerPeer:
    """A learner rank at the hub. Blocking: for use in one thread of the learner's."""

    def __init__(self, address: HubAddress, hello: Hello) -> None:
        self.dropped = 0
        self._hello = encode(hello)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = connect(self._context, address, f"{hello.name}/{hello.incarnation}")
        self._endpoint = self._wanted = address.endpoint
        self._lock = threading.Lock()

    def move(self, address: HubAddress) -> None:
        """The hub has come up elsewhere; a request under way goes there at its next try. Any thread."""
        self._wanted = address.endpoint

    def _follow(self) -> None:
        if self._wanted != self._endpoint:
            self._socket.disconnect(self._endpoint)
            self._endpoint = self._wanted
            self._socket.connect(self._endpoint)

    def request_batch(
        self,
        version: Version,
        timeout_s: float | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> TrainBatch | None:
        """The batch that leads from `version` to the next; None: training is over.

        Asks again every second until it is answered; `on_wait` is called as often and may raise to give up.

        Raises:
            TimeoutError: no batch within `timeout_s`.
        """
        started = time.monotonic()
        request = encode(BatchRequest(version=version))
        with self._lock:
            while True:
                self._follow()
                with suppress(zmq.Again):  # the hub has been away for long: what waits for it is enough
                    self._socket.send(self._hello, zmq.DONTWAIT)
                    self._socket.send(request, zmq.DONTWAIT)
                answered, batch = self._wait(version, time.monotonic() + _RESEND_S)
                if answered:
                    return batch
                if timeout_s is not None and time.monotonic() - started >= timeout_s:
                    raise TimeoutError(f"no batch for version {version} within {timeout_s:g} s")
                if on_wait is not None:
                    on_wait()

    def _wait(self, version: Version, until: float) -> tuple[bool, TrainBatch | None]:
        """Whether the reply came, and its batch; replies to earlier requests are passed over."""
        while (left := until - time.monotonic()) > 0:
            if not self._socket.poll(int(1000 * left) + 1):
                return False, None
            match decode_hub(self._socket.recv()):
                case BatchReply(batch=None):
                    return True, None
                case BatchReply(batch=TrainBatch() as batch):
                    if batch.version == version:
                        return True, batch
                case _:
                    self.dropped += 1
        return False, None

    def close(self) -> None:
        """Closes the socket; may be called twice."""
        self._context.destroy(linger=0)
