"""An engine without vLLM, for tests of the weight group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from caprl_async.weights import channel
from caprl_async.weights.packed import GlooGroup, Manifest, total_bytes, unpack
from caprl_async.weights.types import TransferFailed


class StubEngine:
    """Has the surface of LLMEngine that `receiver` uses and a gloo worker inside, but no model."""

    def __init__(self, fail_in: str = "") -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "start"
        self.paused = False
        self.active = False
        self.fail_in = fail_in
        self._staged: dict[str, torch.Tensor] = {}
        self.log: list[str] = []

    def sleep(self, level: int, mode: str) -> None:
        assert (level, mode) == (0, "keep")
        self.paused = True

    def wake_up(self, tags: list[str]) -> None:
        self.paused = False

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        self.log.append(method)
        if method == self.fail_in:
            self.active = self.active and method != "update_weights"  # as vLLM's worker does
            raise RuntimeError(f"{method} was made to fail")
        if method == "init_weight_transfer_engine":
            i = (kwargs or {})["init_info"]
            store = channel.connect(i["address"], i["port"], i["timeout_s"])
            self.rank = i["rank_offset"]
            self.group = GlooGroup(store, i["epoch"], self.rank, i["world_size"], i["timeout_s"], "127.0.0.1")
        elif method == "start_weight_update":
            assert not self.active, "vLLM refuses to start an update inside an update"
            self.active = True
        elif method == "update_weights":
            self._update((kwargs or {})["update_info"])
        elif method == "finish_weight_update":
            assert self.active
            self.weights.update(self._staged)
            self.active = False

    def _update(self, info: dict[str, Any]) -> None:
        self._staged = {}
        if info.get("discard"):
            return
        manifest = Manifest(**info)
        buffer = torch.empty(total_bytes(manifest), dtype=torch.uint8)
        try:
            self.group.broadcast(buffer)
            self._staged = unpack(manifest, buffer)
        except TransferFailed:
            self.active = False
            raise

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.log.append(f"reset_prefix_cache {reset_running_requests}")
        return True

    def reset_mm_cache(self) -> None:
        self.log.append("reset_mm_cache")

    def reset_encoder_cache(self) -> None:
        self.log.append("reset_encoder_cache")

    def set_weight_version(self, version: str) -> None:
        self.version = version


def run_all(*calls: Callable[[], Any]) -> list[Future[Any]]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [pool.submit(call) for call in calls]
