"""The sender's line to each engine: a few small messages on a TCPStore, the same for every backend.

`EngineClient` is vLLM's `VLLMWeightSyncClient` for several independent engines: it gives each its own rank
offset and tells them the version, which vLLM's own clients do not. An `Inbox` is an engine's end of the line.
Every message is acknowledged, so a bad engine is known before the others load anything.

TCPStore, gloo and NCCL know no authentication: the store listens on one address, loopback unless the ring
spans nodes, and then the nodes must share a network that nobody else can reach.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any, TypeAlias

import msgspec
import torch.distributed as dist

from caprl_async.weights.types import JoinInfo, OpenInfo, TransferFailed

POLL_S = 0.001


class Meet(msgspec.Struct, tag="meet", frozen=True):
    """Are you there? Asked before collectives, which nobody can interrupt, wait for all members."""


class Init(msgspec.Struct, tag="init", frozen=True):
    info: dict[str, Any]  # the backend's worker-side init info, this engine's rank offset in it


class Start(msgspec.Struct, tag="start", frozen=True):
    version: str


class Update(msgspec.Struct, tag="update", frozen=True):
    info: dict[str, Any]  # the backend's update info


class Finish(msgspec.Struct, tag="finish", frozen=True):
    """Every engine has what it needs: load it."""


class Ack(msgspec.Struct, tag="ack", frozen=True):
    error: str = ""


Message: TypeAlias = Meet | Init | Start | Update | Finish
_encode = msgspec.msgpack.Encoder().encode
_decode_message = msgspec.msgpack.Decoder(Message).decode
_decode_ack = msgspec.msgpack.Decoder(Ack).decode


def listen(address: str, timeout_s: float) -> dist.TCPStore:
    """A store server on `address` only (left to itself TCPStore binds every interface), any free port."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def connect(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A client of its own: one client's blocking call would keep the others of its process waiting.

    Raises:
        TransferFailed: nobody answers there.
    """
    try:
        # The server is up before anyone is told of it: a refusal is final, but TCPStore would try on.
        socket.create_connection((address, port), timeout_s).close()
        return dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
    except (OSError, RuntimeError) as error:
        raise TransferFailed(f"no weight sender at {address}:{port}: {error}") from error


def local_address(peer: str) -> str:
    """This machine's address on the way to `peer` (no packet is sent); loopback for a loopback peer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 1))
        return str(probe.getsockname()[0])


def cancel(info: JoinInfo, reason: str) -> None:
    """Ends every wait in the group of `info` at once; the driver calls it when it learns of a failure."""
    connect(info.address, info.port, info.timeout_s).set(_cancel_key(info.epoch), reason)


def _cancel_key(epoch: int) -> str:
    return f"{epoch}/cancel"


def _put(store: Any, key: str, message: Message | Ack) -> None:
    store.set(key, _encode(message))  # bytes are right, though torch's stub says str


def _wait_for(store: dist.Store, epoch: int, key: str, deadline: float, what: str) -> bytes:
    while not store.check([key]):
        if store.check([_cancel_key(epoch)]):
            raise TransferFailed("cancelled: " + store.get(_cancel_key(epoch)).decode())
        if time.monotonic() > deadline:
            raise TransferFailed(f"timed out waiting for {what}")
        time.sleep(POLL_S)
    return store.get(key)


class Inbox:
    """An engine's end of the line. Each message is read once, in order, and answered with `reply`."""

    def __init__(self, info: JoinInfo) -> None:
        self._info = info
        self._store = connect(info.address, info.port, info.timeout_s)
        self._prefix = f"{info.epoch}/{info.engine}"
        self._current = 0

    def next(self) -> Message:
        """The sender's next message.

        Raises:
            TransferFailed: none came in time, the group was cancelled, or the sender is gone.
        """
        try:
            self._current = self._store.add(f"{self._prefix}/read", 1)
            deadline = time.monotonic() + self._info.timeout_s
            key = f"{self._prefix}/{self._current}"
            raw = _wait_for(self._store, self._info.epoch, key, deadline, "the weight sender")
        except dist.DistError as error:
            raise TransferFailed(f"the weight sender is gone: {error}") from error
        message: Message = _decode_message(raw)
        return message

    def reply(self, error: str = "") -> None:
        """Acknowledges the message read last.

        Raises:
            TransferFailed: the sender is gone.
        """
        try:
            _put(self._store, f"{self._prefix}/{self._current}/ack", Ack(error))
        except dist.DistError as lost:
            raise TransferFailed(f"the weight sender is gone: {lost}") from lost


class EngineClient:
    """The sender's end of all lines; structurally a `VLLMWeightSyncClient`.

    Each call returns when every engine has done it.

    Raises (all calls):
        TransferFailed: an engine refused, was silent for `timeout_s`, or the driver cancelled the group.
    """

    def __init__(self, group: OpenInfo, port: int) -> None:
        self._group = group
        self._store = connect(group.address, port, group.timeout_s)
        self._count = 0
        self.version = ""  # set before a transfer; travels with `start_weight_update`

    def meet(self) -> None:
        """Waits until every engine is on its line."""
        self._call_all(Meet())

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Like vLLM's, but a `rank_offset` in the info is replaced by each engine's own."""
        infos = [dict(init_info) for _ in self._group.sizes]
        for info, offset in zip(infos, self._group.offsets, strict=True):
            if "rank_offset" in info:
                info["rank_offset"] = offset
        self._call([Init(info) for info in infos])

    def start_weight_update(self) -> None:
        self._call_all(Start(self.version))

    def update_weights(self, update_info: Any) -> None:
        """One payload of names, dtypes and shapes; CUDA IPC handles in it become plain values."""
        if "ipc_handles" in update_info:
            from caprl_async.weights.ipc import to_plain

            update_info = to_plain(update_info)
        self._call_all(Update({key: value for key, value in update_info.items() if value is not None}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call_all(Finish())

    def abort(self, reason: str) -> None:
        """Ends the group: engines that wait for more go back to their old weights."""
        self._store.set(_cancel_key(self._group.epoch), reason)

    def _call_all(self, message: Message) -> None:
        self._call([message] * len(self._group.sizes))

    def _call(self, messages: list[Any]) -> None:
        self._count += 1
        epoch, deadline = self._group.epoch, time.monotonic() + self._group.timeout_s
        keys = [f"{epoch}/{engine}/{self._count}" for engine in range(len(messages))]
        for key, message in zip(keys, messages, strict=True):
            _put(self._store, key, message)
        errors = []
        for engine, key in enumerate(keys):
            raw = _wait_for(self._store, epoch, f"{key}/ack", deadline, f"engine {engine} of the group")
            ack = _decode_ack(raw)
            errors += [f"engine {engine}: {ack.error}"] if ack.error else []
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/ack")
        if errors:
            raise TransferFailed("; ".join(errors))
