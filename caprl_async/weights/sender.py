"""The sending end, in learner rank 0: keeps one group of engines open and broadcasts snapshots to it.

All backends drive the same calls on the same `EngineClient`; they differ in how the bytes travel. nccl and
ipc are vLLM's own trainer engines. A collective cannot be interrupted, so it runs in a thread that is left
behind when it hangs; the learner goes on and the driver opens a new group.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from caprl_async.types import Version
from caprl_async.weights import channel
from caprl_async.weights.channel import EngineClient
from caprl_async.weights.packed import GlooGroup, pack
from caprl_async.weights.types import JoinInfo, OpenInfo, TransferFailed

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo

T = TypeVar("T")


class Transport(Protocol):
    """One way for the bytes of an open group."""

    def send(self, tensors: Mapping[str, Tensor]) -> None: ...


class GlooTransport:
    """Announces the manifest and broadcasts the buffer; engines load when all have verified it."""

    def __init__(self, group: OpenInfo, port: int, client: EngineClient) -> None:
        self._client = client
        init = {
            "address": group.address,
            "port": port,
            "epoch": group.epoch,
            "rank_offset": 1,
            "world_size": group.world_size,
            "timeout_s": group.timeout_s,
        }
        store = channel.connect(group.address, port, group.timeout_s)
        client.meet()
        with ThreadPoolExecutor(1) as side:  # the engines join while we do
            joined = side.submit(client.init_weight_transfer_engine, init)
            self._group = GlooGroup(
                store, group.epoch, 0, group.world_size, group.timeout_s, channel.local_address(group.address)
            )
            joined.result()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        manifest, buffer = pack(tensors)
        self._client.start_weight_update()
        with ThreadPoolExecutor(1) as side:  # the engines receive while we broadcast
            received = side.submit(self._client.update_weights, manifest.fields())
            self._group.broadcast(buffer)
            received.result()
        self._client.finish_weight_update()


class VllmTransport:
    """vLLM's trainer side for nccl or ipc, fed with one snapshot after the other."""

    def __init__(self, group: OpenInfo, client: EngineClient, device: torch.device) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        client.meet()
        self._source = _snapshot_source(device)
        init = trainer_init_info(group)
        self._trainer = WeightTransferTrainerFactory.trainer_init(init, client=client, source=self._source)

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        self._source.tensors = tensors
        self._trainer.send_weights()


def trainer_init_info(group: OpenInfo) -> TrainerInitInfo:
    """vLLM's trainer-side init info of a group with the sender alone on rank 0."""
    if group.backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            rank=0,
            master_address=group.address,
            master_port=_free_port(group.address),
            world_size=group.world_size,
            packed=True,
        )
    if group.backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0, packed=True)
    raise ValueError(f"weights.backend {group.backend!r}: choose gloo, nccl or ipc")


def _snapshot_source(device: torch.device) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class SnapshotSource(WeightSource):
        """The current snapshot; a parameter comes to the device only when its turn has come."""

        def __init__(self) -> None:
            self.tensors: Mapping[str, Tensor] = {}

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors.items():
                yield name, tensor.detach().to(device)

    return SnapshotSource()


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        return int(probe.getsockname()[1])


class WeightSender:
    """Sends snapshots to the open group. Its calls must not overlap; training may go on beside them."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._group: OpenInfo | None = None
        self._store: dist.TCPStore | None = None  # the server lives as long as the group
        self._client: EngineClient | None = None
        self._transport: Future[Transport] | None = None

    def open(
        self,
        *,
        backend: str,
        epoch: int,
        sizes: Sequence[int],
        address: str = "127.0.0.1",
        timeout_s: float = 60.0,
    ) -> list[dict[str, Any]]:
        """Opens a group (fields as in `OpenInfo`) in place of the last one; returns a `JoinInfo` per engine.

        It returns at once; the group is formed in the background while the engines join.

        Raises:
            ValueError: the backend cannot be used here.
        """
        self.close()
        group = OpenInfo(backend, epoch, tuple(sizes), address, timeout_s)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if backend == "ipc" and ranks > 1:
            # vLLM's ipc sender gathers handles over the default group, in which the other ranks are training.
            raise ValueError("weights.backend=ipc needs learner.num_ranks=1; use nccl with several ranks")
        if backend not in ("gloo", "nccl", "ipc"):
            raise ValueError(f"weights.backend {backend!r}: choose gloo, nccl or ipc")
        self._store = channel.listen(address, timeout_s)
        port = self._store.port
        client = EngineClient(group, port)
        self._group, self._client = group, client

        def form() -> Transport:
            if backend == "gloo":
                return GlooTransport(group, port, client)
            return VllmTransport(group, client, self._device)

        self._transport = self._in_background(form)
        joins = [JoinInfo(backend, epoch, address, port, k, timeout_s) for k in range(len(sizes))]
        return [asdict(join) for join in joins]

    def send(self, version: Version, tensors: Mapping[str, Tensor]) -> float:
        """Sends tensors (checkpoint names -> full tensors, any device) as `version`; returns the seconds.

        The tensors must not change meanwhile. After a failure the group is closed: open a new one.

        Raises:
            TransferFailed: not every engine has loaded them; each engine's own call says how it fared.
        """
        if self._group is None or self._client is None or self._transport is None:
            raise TransferFailed("no weight group is open")
        started = time.monotonic()
        self._client.version = str(version)
        try:
            transport = self._result(self._transport)
            self._result(self._in_background(lambda: transport.send(tensors)))
        except Exception as error:
            self._abort(f"{type(error).__name__}: {error}")
            raise TransferFailed(f"version {version} was not sent to every engine: {error}") from error
        return time.monotonic() - started

    def close(self) -> None:
        """Leaves the group; engines that wait for it are told."""
        if self._group is not None:
            self._abort("the sender closed the group")

    def _abort(self, reason: str) -> None:
        client, self._group, self._client, self._transport = self._client, None, None, None
        if client is not None:
            client.abort(reason)
        # The store's server stays until the next open, so that engines can still read the reason.

    def _result(self, future: Future[T]) -> T:
        assert self._group is not None
        limit = 2 * self._group.timeout_s  # its own waits are shorter: only a hung collective gets here
        try:
            return future.result(limit)
        except TimeoutError:
            raise TransferFailed(f"the {self._group.backend} transfer hangs since {limit:.0f} s") from None

    def _in_background(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # the current device belongs to the thread
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="weight-sender", daemon=True).start()
        return future
