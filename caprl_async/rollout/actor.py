"""The rollout in the ring: a process that leases prompts from the queue, captions them and sends the groups.

It receives images and prompts, never a question: no message that reaches it has a field for one. Weight
updates meet its requests half-way: they are kept, and go on under the new weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from caprl_async.config import Config
from caprl_async.data.processor import PolicyProcessor, UnreadableImage, read_size
from caprl_async.engine.build import VisionLimits
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import EngineDied, RequestFailed
from caprl_async.process import call_me, doing, whereabouts
from caprl_async.rollout import sampling
from caprl_async.types import CaptionGroup, Generated, GenerateLease, Hello, Prompt, Role

if TYPE_CHECKING:
    from caprl_async.replay.peer import Peer
    from caprl_async.replay.transport import HubAddress

_WATCH_S = 1.0  # between looks at an engine that may have died while idle

log = logging.getLogger(__name__)


class NotStarted(RuntimeError):
    """The actor has no engine yet, or no more; call `start` first."""


class RolloutActor:
    """One policy engine. An engine that died ends the process, so that Ray starts a fresh one."""

    def __init__(self, name: str, config: Config, hub: HubAddress) -> None:
        self.name = name
        self._config = config
        self._hub = hub
        self._engine: Engine | None = None
        self._processor: PolicyProcessor | None = None
        self._peer: Peer | None = None
        self._starting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._groups = 0
        self._failures = 0

    def __repr__(self) -> str:
        return self.name

    # ------------------------------------------------------------ control

    async def hub_moved(self, address: HubAddress) -> None:
        """The queue has come up elsewhere."""
        self._hub = address
        if self._peer is not None:
            self._peer.move(address)

    async def start(self) -> dict[str, Any]:
        """Loads the policy and begins to take leases; asking twice is harmless.

        Raises:
            EngineDied, UnsupportedModel: the policy's checkpoint cannot be served.
        """
        async with self._starting:
            call_me(self.name)
            if self._engine is None:
                begun = time.monotonic()
                self._processor, self._engine = await asyncio.to_thread(self._build)
                log.info(
                    "%s: %s ready in %.1f s", self.name, self._config.policy.model, time.monotonic() - begun
                )
                self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._watch())]
        return {"name": self.name, "model": self._config.policy.model, "version": str(self.engine.version)}

    async def stop(self) -> None:
        """Takes no more leases and ends the engine; safe to call twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)

    async def health(self) -> dict[str, Any]:
        """Load and counters since start."""
        if self._engine is None:
            return {"name": self.name, "started": False, **whereabouts()}
        return {
            "name": self.name,
            "started": True,
            **whereabouts(),
            "version": str(self._engine.version),
            "groups": self._groups,
            "failures": self._failures,
            **asdict(self._engine.stats()),
        }

    # ------------------------------------------------------------ weights

    async def join_weight_group(self, **info: Any) -> None:
        """Takes this engine's place in the group that `info` (the fields of `JoinInfo`) describes.

        Raises:
            TransferFailed: the group was not formed; the engine is as it was.
        """
        from caprl_async.weights.receiver import open_receiver

        await self.engine.call(lambda llm: open_receiver(llm, info))

    async def receive_weights(self, *, version: str, **info: Any) -> dict[str, float]:
        """Takes one update between two engine steps; unfinished captions go on under the new weights.

        Returns:
            Seconds of each phase, see `weights.receiver.receive`.

        Raises:
            TransferFailed: the engine goes on at its old version.
            EngineDirty: the weights may be half written; the supervisor must restart this actor.
        """
        from caprl_async.weights.receiver import receive

        with doing(f"receiving {version}"):
            seconds = await self.engine.call(lambda llm: receive(llm, info, version))
        self.announce()
        return seconds

    async def weights_fingerprint(self) -> dict[str, str]:
        """sha256 of each tensor the engine now computes with, by checkpoint name.

        Raises:
            CannotCompare: see `engine.fingerprint.fingerprint`.
        """
        from caprl_async.engine.fingerprint import fingerprint

        return await self.engine.call(lambda llm: fingerprint(llm, self._config.policy.model))

    # ------------------------------------------------------------ work

    async def answer(self, lease: GenerateLease) -> Generated:
        """The group of one lease, or why there is none. Cancelling aborts its captions."""
        try:
            with doing("captioning"):
                group = await self._caption(lease.prompt)
        except EngineDied as error:
            self._die(error)
            raise
        except (RequestFailed, UnreadableImage, sampling.BadSample) as error:
            self._failures += 1
            log.warning("%s: no captions for %s: %s", self.name, lease.prompt.key, error)
            return Generated(lease=lease.lease, failure=f"{type(error).__name__}: {error}")
        self._groups += 1
        return Generated(lease=lease.lease, group=group)

    def credit(self) -> dict[str, Any]:
        """What a `Credit` tells of this rollout besides its free places."""
        stats = self.engine.stats()
        return {
            "version": self.engine.version,
            "busy_s": stats.busy_s,
            "alive_s": stats.alive_s,
            "tokens": stats.sampled_tokens,
            "cached_tokens": stats.cached_tokens,
        }

    def announce(self) -> None:
        """Tells the queue at once that the weights are new: it may be waiting for an engine that has them."""
        if self._peer is not None:
            self._peer.announce()

    @property
    def engine(self) -> Engine:
        """
        Raises:
            NotStarted: there is none.
        """
        if self._engine is None:
            raise NotStarted(f"{self.name} has no engine; call start first")
        return self._engine

    async def _caption(self, prompt: Prompt) -> CaptionGroup:
        assert self._processor is not None
        processor, started = self._processor, time.time()
        sizes = await asyncio.to_thread(lambda: [read_size(picture) for picture in prompt.image.pictures])
        grids = tuple(processor.grid(*size) for size in sizes)
        asked = sampling.request(prompt, processor)
        answer = await self.engine.generate(asked)
        return sampling.caption_group(
            prompt, asked, answer, grids, processor, actor=self.name, started=started, finished=time.time()
        )

    def _build(self) -> tuple[PolicyProcessor, Engine]:
        policy, config = self._config.policy, self._config
        processor = PolicyProcessor(policy.model, policy.min_pixels, policy.max_pixels)
        engine = Engine(
            policy.model,
            config.rollout.engine,
            seed=(config.seed + zlib.crc32(self.name.encode())) % 2**32,  # no two draw the same captions
            vision=VisionLimits(policy.min_pixels, policy.max_pixels, max(1, config.data.frames)),
            weight_backend=config.weights.backend.value,
            banned_token_ids=processor.banned_token_ids,
        )
        return processor, engine

    async def _serve(self) -> None:
        from caprl_async.replay.peer import Peer

        hello = Hello(role=Role.ROLLOUT, name=self.name, incarnation=uuid.uuid4().hex)
        try:
            self._peer = Peer(self._hub, hello)
            await self._peer.serve(
                self.answer, self._config.rollout.max_requests_in_flight_per_actor, self.credit
            )
        except Exception as error:  # a rollout that takes no leases must not look alive
            self._die(error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if self.engine.died is not None:
                self._die(self.engine.died)

    def _die(self, error: BaseException) -> None:
        """Ends the process at once; Ray restarts it and the queue leases its work again."""
        log.critical("%s ends: %s", self.name, error, exc_info=error)
        logging.shutdown()
        os._exit(1)
