"""The receiving end: two functions that run on the engine's thread between two of its steps.

Requests are kept through an update: they are paused, their keys and values are dropped with every cache the
old weights filled, and they go on under the new weights.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from caprl_async.weights.channel import Finish, Inbox, Init, Meet, Message, Start, Update
from caprl_async.weights.types import EngineDirty, JoinInfo, TransferFailed

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def open_receiver(llm_engine: LLMEngine, info: dict[str, Any]) -> None:
    """Joins the sender's group; `info` holds the fields of `JoinInfo`. Waits until all members have joined.

    Raises:
        TransferFailed: the group was not formed; the engine is as it was.
    """
    inbox = Inbox(JoinInfo(**info))
    message = inbox.next()
    if isinstance(message, Meet):
        inbox.reply()
        message = inbox.next()
    if not isinstance(message, Init):
        raise TransferFailed(f"expected the group's init message, got {type(message).__name__}")
    try:
        llm_engine.collective_rpc("shutdown_weight_transfer_engine")  # leaves an older group
        llm_engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": message.info})
    except Exception as error:
        inbox.reply(error=_text(error))
        raise TransferFailed(f"could not join the weight group: {_text(error)}") from error
    inbox.reply()


def receive(llm_engine: LLMEngine, info: dict[str, Any], version: str) -> dict[str, float]:
    """Takes one update; `info` as for `open_receiver`, `version` is what the sender must announce.

    Returns:
        Seconds: `wait` (for the sender and the other engines), `transfer`, `load`, `reset`, `total`.

    Raises:
        TransferFailed: nothing was changed; the engine is awake and at its old version.
        EngineDirty: the weights may be half written; the engine stays paused and must be restarted.
    """
    started = time.monotonic()
    llm_engine.sleep(level=0, mode="keep")
    session = _Session(llm_engine, JoinInfo(**info), version)
    try:
        session.run()
    except TransferFailed:
        llm_engine.wake_up(tags=["scheduling"])
        raise
    llm_engine.wake_up(tags=["scheduling"])
    return {**session.seconds, "total": time.monotonic() - started}


class _Session:
    """One transfer: obeys the sender's messages and knows at each moment what a failure would leave."""

    def __init__(self, llm_engine: LLMEngine, info: JoinInfo, version: str) -> None:
        self._engine = llm_engine
        self._info = info
        self._version = version
        # gloo stages and verifies before it loads. With several workers one failure puts the executor's
        # answers out of step, so there is no way back either.
        self._stages = info.backend == "gloo" and llm_engine.vllm_config.parallel_config.world_size == 1
        self._dirty = False
        self._active = False  # vLLM's worker is inside start ... finish
        self.seconds = {"wait": 0.0, "transfer": 0.0, "load": 0.0, "reset": 0.0}

    def run(self) -> None:
        try:
            inbox = Inbox(self._info)
            while self._obey(inbox):
                pass
        except Exception as error:
            text = f"update to version {self._version}: {_text(error)}"
            if self._dirty:
                raise EngineDirty(f"{text}; restart this engine") from error
            if self._active:
                self._discard()
            raise TransferFailed(text) from error

    def _obey(self, inbox: Inbox) -> bool:
        """Carries out the next message; false after the last."""
        started = time.monotonic()
        message = inbox.next()
        self.seconds["wait"] += time.monotonic() - started
        try:
            self._carry_out(message)
        except Exception as error:
            inbox.reply(error=_text(error))
            raise
        inbox.reply()
        return not isinstance(message, Finish)

    def _carry_out(self, message: Message) -> None:
        started = time.monotonic()
        match message:
            case Start(version):
                if version != self._version:
                    raise TransferFailed(f"the learner sends version {version}")
                self._dirty = not self._stages  # vLLM's own backends take the layers apart at the start
                self._engine.collective_rpc("start_weight_update")
                self._active = True
            case Update(info):
                self._active = False  # a failing update ends vLLM's session
                self._engine.collective_rpc("update_weights", kwargs={"update_info": info})
                self._active = True
                self.seconds["transfer"] += time.monotonic() - started
            case Finish():
                self._dirty = True
                self._engine.collective_rpc("finish_weight_update")
                self.seconds["load"] = time.monotonic() - started
                self._forget_old_weights()
                self.seconds["reset"] = time.monotonic() - started - self.seconds["load"]
            case Init() | Meet():
                raise TransferFailed("the sender opened the group again in the middle of a transfer")

    def _forget_old_weights(self) -> None:
        """Every cache that the old weights filled, also that of requests under way; then the new name."""
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache could not be reset")
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()
        self._engine.set_weight_version(self._version)

    def _discard(self) -> None:
        """Drops what was staged and ends vLLM's session without loading."""
        try:
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"discard": True}})
            self._engine.collective_rpc("finish_weight_update")
        except Exception as error:
            raise EngineDirty(f"a broken update could not be taken back: {_text(error)}") from error


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
