"""The judge in the ring: a process that leases captions and questions from the queue and sends verdicts.

It receives no image, and its engine has no vision, but for `judge.mode=rate`: then it is a `Rater`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

from caprl_async.config import Config, JudgeConfig, JudgeEndpointConfig, JudgeMode
from caprl_async.engine.types import EngineDied
from caprl_async.judge.judge import Judge
from caprl_async.judge.panel import model_of, panel
from caprl_async.judge.rating import Rater
from caprl_async.process import call_me, doing, whereabouts
from caprl_async.types import Hello, Judged, JudgeLease, Role

if TYPE_CHECKING:
    from caprl_async.replay.peer import Peer
    from caprl_async.replay.transport import HubAddress

_WATCH_S = 1.0  # between looks at an engine that may have died while idle

log = logging.getLogger(__name__)


def judge_config(config: Config, serves: str) -> JudgeConfig:
    """The judge that answers `serves` questions; those that train differ in their model only.

    The held-out model is held by an engine of ours, also where the other judge is an endpoint.

    Raises:
        ValueError: there is no such judge.
    """
    judges = panel(config.judge)
    if serves in judges:
        return dataclasses.replace(config.judge, model=model_of(config.judge, serves))
    if serves != "heldout":
        raise ValueError(f"a judge serves one of {(*judges, 'heldout')}, not {serves!r}")
    heldout = config.evaluate.heldout_judge
    return dataclasses.replace(
        config.judge,
        model=heldout.model,
        mode=heldout.mode or config.judge.mode,
        endpoint=JudgeEndpointConfig(),
    )


class JudgeActor:
    """One judge replica. An engine that died ends the process, so that Ray starts a fresh one."""

    def __init__(self, name: str, serves: str, config: Config, hub: HubAddress) -> None:
        self.name = name
        self.serves = serves
        self._ring = config
        self._config = judge_config(config, serves)
        self._model = self._config.endpoint.url or self._config.model
        self._hub = hub
        self._judge: Judge | Rater | None = None
        self._peer: Peer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return self.name

    async def hub_moved(self, address: HubAddress) -> None:
        """The queue has come up elsewhere."""
        self._hub = address
        if self._peer is not None:
            self._peer.move(address)

    async def start(self) -> dict[str, Any]:
        """Loads the model (or finds its endpoint) and begins to take leases; asking twice is harmless.

        Raises:
            FileNotFoundError, PromptError, JudgeConfigError, EngineDied: see `Judge.load`.
        """
        call_me(self.name)
        if self._judge is None:
            begun = time.monotonic()
            self._judge = await asyncio.to_thread(self._load)
            log.info("%s: %s ready in %.1f s", self.name, self._model, time.monotonic() - begun)
            if self._judge.note:
                log.warning("%s: %s", self.name, self._judge.note)
            self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._watch())]
        return {
            "name": self.name,
            "serves": self.serves,
            "model": self._model,
            "mode": self._judge.mode.value,
            "note": self._judge.note,
        }

    def _load(self) -> Judge | Rater:
        if self._config.mode is JudgeMode.rate:
            return Rater.load(self._config, self._ring)
        return Judge.load(self._config, self._ring.seed)

    async def health(self) -> dict[str, Any]:
        """Load and counters since start."""
        if self._judge is None:
            return {"name": self.name, "started": False, **whereabouts()}
        cache = self._judge.cache
        return {
            "name": self.name,
            "started": True,
            **whereabouts(),
            "verdict_cache_hits": cache.hits,
            "verdict_cache_misses": cache.misses,
            **dataclasses.asdict(self._judge.stats()),
        }

    async def stop(self) -> None:
        """Takes no more leases and ends the engine; safe to call twice."""
        peer, self._peer = self._peer, None
        tasks, self._tasks = self._tasks, []
        if peer is not None:
            await peer.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        judge, self._judge = self._judge, None
        if judge is not None:
            await asyncio.to_thread(judge.close)

    async def answer(self, lease: JudgeLease) -> Judged:
        """Verdicts for one lease. What this raises the peer reports as a failure of the lease."""
        assert self._judge is not None
        try:
            with doing("judging"):
                if isinstance(self._judge, Rater):
                    verdicts = await self._judge.rate(lease.captions, lease.questions, lease.image)
                else:
                    verdicts = await self._judge.judge(lease.captions, lease.questions, lease.rotation)
        except EngineDied as error:
            self._die(error)
            raise
        return Judged(lease=lease.lease, verdicts=verdicts)

    def credit(self) -> dict[str, Any]:
        """What a `Credit` tells of this judge besides its free places."""
        assert self._judge is not None
        stats = self._judge.stats()
        return {
            "busy_s": stats.busy_s,
            "alive_s": stats.alive_s,
            "tokens": stats.prompt_tokens - stats.cached_tokens,
            "cached_tokens": stats.cached_tokens,
        }

    async def _serve(self) -> None:
        from caprl_async.replay.peer import Peer

        hello = Hello(role=Role.JUDGE, name=self.name, incarnation=uuid.uuid4().hex, serves=self.serves)
        try:
            self._peer = Peer(self._hub, hello)
            await self._peer.serve(self.answer, self._config.max_requests_in_flight_per_actor, self.credit)
        except Exception as error:  # a judge that takes no leases must not look alive
            self._die(error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            died = self._judge.died if self._judge is not None else None
            if died is not None:
                self._die(died)

    def _die(self, error: BaseException) -> None:
        """Ends the process at once; Ray restarts it and the queue leases its work again."""
        log.critical("%s ends: %s", self.name, error, exc_info=error)
        logging.shutdown()
        os._exit(1)
