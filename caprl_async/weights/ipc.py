"""CUDA IPC handles as plain values, so that they travel without pickle; the rest is vLLM's ipc backend.

Only the fields of `torch.multiprocessing.reductions.rebuild_cuda_tensor`'s arguments
are sent, and the classes among them are fixed here.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

_ARGUMENTS = 15  # of rebuild_cuda_tensor in torch 2.13
_STORAGES = {"untyped": torch.UntypedStorage, "typed": torch.TypedStorage}


def _plain_handle(args: tuple[Any, ...]) -> list[Any]:
    _, size, stride, offset, storage, dtype, *rest = args
    if len(args) != _ARGUMENTS:
        raise RuntimeError(f"this torch makes IPC handles of {len(args)} fields; {_ARGUMENTS} are known")
    kind = "untyped" if storage is torch.UntypedStorage else "typed"
    return [list(size), list(stride), offset, kind, str(dtype).removeprefix("torch."), *rest]


def _handle(plain: list[Any]) -> tuple[Any, ...]:
    size, stride, offset, kind, dtype_name, *rest = plain
    dtype = getattr(torch, dtype_name)
    if not isinstance(dtype, torch.dtype) or len(plain) != _ARGUMENTS - 1:
        raise ValueError("not a CUDA IPC handle")
    return (torch.Tensor, tuple(size), tuple(stride), offset, _STORAGES[kind], dtype, *rest)


def to_plain(update_info: dict[str, Any]) -> dict[str, Any]:
    """A packed IPC update with its handles (GPU UUID -> arguments) as lists of numbers, bytes and names."""
    handles = {gpu: _plain_handle(args) for gpu, args in update_info["ipc_handles"].items()}
    return {**update_info, "ipc_handles": handles}


def from_plain(update_info: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `to_plain`.

    Raises:
        ValueError: it is not what `to_plain` makes.
    """
    handles = {gpu: _handle(plain) for gpu, plain in update_info["ipc_handles"].items()}
    return {**update_info, "ipc_handles": handles}


class PlainIPCWeightTransferEngine(IPCWeightTransferEngine):
    """vLLM's engine, reading plain handles."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        return super().parse_update_info(from_plain(update_dict))
