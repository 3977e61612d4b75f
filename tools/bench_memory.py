"""Peak memory and matmul rate of a device, for the benchmarks."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from types import TracebackType

import torch


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Peak:
    """The most memory that was in use within the block: `whole`, and in `bytes` above what was at its start.

    On a GPU what torch allocated; on a CPU the process's resident memory (Linux with glibc).
    """

    bytes: int = 0
    whole: int = 0

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> Peak:
        if self._device == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory kept from before would hide new use
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self._before = _status("VmRSS")
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device == "cpu":
            self.whole = _status("VmHWM")
        else:
            torch.cuda.synchronize()
            self.whole = torch.cuda.max_memory_allocated()
        self.bytes = self.whole - self._before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def matmul_rate(device: str, dtype: torch.dtype, size: int = 0, seconds: float = 2.0) -> float:
    """FLOP per second of a large square matrix product, after as long a time of warming up."""
    size = size or (2048 if device == "cpu" else 8192)
    one, other = torch.randn(2, size, size, device=device, dtype=dtype)
    out = one @ other

    def work() -> float:
        synchronise(device)
        began, products = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(1 if device == "cpu" else 20):
                torch.mm(one, other, out=out)
                products += 1
            synchronise(device)
        return products * 2 * size**3 / (time.perf_counter() - began)

    work()  # a GPU that was idle has low clocks
    return work()
