"""Weights as one flat buffer and a manifest, and the gloo group that carries the buffer; free of vLLM.

The learner imports this, so that a CPU learner need not import vLLM (240 MB) in order to send.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caprl_async.weights.types import TransferFailed

ALIGN = 16  # bytes; every tensor starts at a multiple, so that it can be viewed in place
PIECE = 256 * 1024 * 1024  # bytes of one broadcast

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class Manifest:
    """What the buffer holds, in order; the names of the fields are those of vLLM's update infos."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    checksum: int  # CRC-32 of the whole buffer, padding included

    def fields(self) -> dict[str, Any]:
        """As the update info that travels on the channel."""
        return dict(vars(self))


def _spans(manifest: Manifest) -> Iterator[tuple[str, torch.dtype, list[int], int, int]]:
    """(name, dtype, shape, first byte, bytes) of each tensor.

    Raises:
        TransferFailed: the manifest is not one that `pack` makes.
    """
    counts = {len(manifest.names), len(manifest.dtype_names), len(manifest.shapes)}
    if len(counts) != 1 or len(set(manifest.names)) != len(manifest.names):
        raise TransferFailed(f"manifest names, dtypes and shapes do not match one to one: counts {counts}")
    start = 0
    for name, dtype_name, shape in zip(manifest.names, manifest.dtype_names, manifest.shapes, strict=True):
        if dtype_name not in _DTYPES or any(size < 0 for size in shape):
            raise TransferFailed(f"{name}: cannot receive {dtype_name} of shape {shape}")
        dtype = _DTYPES[dtype_name]
        size = math.prod(shape) * dtype.itemsize
        yield name, dtype, shape, start, size
        start += -(-size // ALIGN) * ALIGN


def total_bytes(manifest: Manifest) -> int:
    """Bytes of the buffer that the manifest describes."""
    return sum(-(-size // ALIGN) * ALIGN for *_, size in _spans(manifest))


def checksum(buffer: Tensor) -> int:
    """CRC-32 of a flat uint8 buffer."""
    return zlib.crc32(buffer.numpy())  # type: ignore[arg-type]


def pack(tensors: Mapping[str, Tensor]) -> tuple[Manifest, Tensor]:
    """Copies tensors (on any device) into one CPU buffer uint8[total_bytes]."""
    names, values = list(tensors), [tensor.detach() for tensor in tensors.values()]
    dtypes = [str(value.dtype).removeprefix("torch.") for value in values]
    plan = Manifest(names, dtypes, [list(value.shape) for value in values], 0)
    buffer = torch.zeros(total_bytes(plan), dtype=torch.uint8)
    for value, (_, dtype, shape, start, size) in zip(values, _spans(plan), strict=True):
        buffer[start : start + size].view(dtype).view(shape).copy_(value)
    return Manifest(plan.names, plan.dtype_names, plan.shapes, checksum(buffer)), buffer


def unpack(manifest: Manifest, buffer: Tensor) -> dict[str, Tensor]:
    """Views into the buffer, by name.

    Raises:
        TransferFailed: the buffer is not the one that the manifest describes.
    """
    if buffer.numel() != total_bytes(manifest):
        raise TransferFailed(f"{buffer.numel()} bytes came, {total_bytes(manifest)} were announced")
    found = checksum(buffer)
    if found != manifest.checksum:
        raise TransferFailed(f"checksum {found:#010x} of the weights, {manifest.checksum:#010x} announced")
    return {
        name: buffer[start : start + size].view(dtype).view(shape)
        for name, dtype, shape, start, size in _spans(manifest)
    }


class GlooGroup:
    """A process group beside any default group; rank 0 sends. Opening it waits for all members."""

    def __init__(
        self, store: dist.Store, epoch: int, rank: int, world_size: int, timeout_s: float, address: str
    ) -> None:
        """`address` is this member's own; gloo listens on no other.

        Raises:
            TransferFailed: not all members came in time.
        """
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack the options and the collectives
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        try:
            prefixed = dist.PrefixStore(f"wsync/{epoch}", store)
            self._group = gloo(prefixed, rank, world_size, options)
        except RuntimeError as error:
            raise TransferFailed(f"weight group {epoch} was not formed: {error}") from error

    def broadcast(self, buffer: Tensor) -> None:
        """Rank 0's bytes into everybody's buffer uint8[total_bytes].

        Raises:
            TransferFailed: a member is gone or silent.
        """
        try:
            for piece in buffer.split(PIECE):
                self._group.broadcast(piece, 0).wait()
        except RuntimeError as error:
            raise TransferFailed(f"broadcast of the weights broke: {error}") from error
