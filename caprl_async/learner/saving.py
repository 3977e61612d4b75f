"""Checkpoints are copied into memory while all ranks stand still, and written while they train on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from caprl_async.files import Digests, digest_file
from caprl_async.process import doing

Export: TypeAlias = tuple[Path, Callable[[Path], None]]
"""A folder, and who writes files into it."""

_FULL = 1 << 24  # bytes; with less left, what could not be written had no room


@dataclass(frozen=True)
class Copied:
    """One file's content, of which nobody holds a part that will change."""

    path: Path
    state: Any


class BackgroundWriter:
    """Writes one checkpoint's files of this rank at a time, in a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[Digests] | None = None

    def write(self, root: Path, copied: Sequence[Copied], exports: Sequence[Export]) -> None:
        """Begins, after what is being written now; all lies below `root`."""
        self._last = self._thread.submit(_write, root, copied, exports)

    def wait(self) -> Digests:
        """Size and sha256 of each file that the last `write` wrote, by its path below the root.

        Raises:
            OSError: it failed.
        """
        if self._last is None:
            return {}
        return self._last.result()


def _write(root: Path, copied: Sequence[Copied], exports: Sequence[Export]) -> Digests:
    try:
        return _write_all(root, copied, exports)
    except RuntimeError as error:  # torch says "unexpected pos" where the disk is full
        if shutil.disk_usage(root).free < _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root)) from error
        raise


def _write_all(root: Path, copied: Sequence[Copied], exports: Sequence[Export]) -> Digests:
    with doing("writing a checkpoint"):
        files = []
        for file in copied:
            torch.save(file.state, file.path)
            files.append(file.path)
        for folder, fill in exports:
            folder.mkdir(parents=True, exist_ok=True)
            fill(folder)
            files += [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): digest_file(path) for path in files}


def memory_engine() -> Any:
    """A checkpoint engine of DeepSpeed's that keeps copies, as `files: list[Copied]`, and writes nothing."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class MemoryEngine(CheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.files: list[Copied] = []

        def create(self, info: Any) -> None:
            """Nothing to prepare."""

        def save(self, state_dict: Any, path: str) -> None:
            self.files.append(Copied(Path(path), _copy(state_dict, {})))

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError("what was only copied cannot be loaded")

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False

    return MemoryEngine()


def _copy(state: Any, known: dict[int, Tensor]) -> Any:
    """`state` with every tensor copied to the CPU, once each."""
    if isinstance(state, Tensor):
        if id(state) not in known:
            known[id(state)] = state.detach().to("cpu", copy=True)
        return known[id(state)]
    if isinstance(state, dict):
        return type(state)((key, _copy(value, known)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_copy(value, known) for value in state)
    return deepcopy(state)
