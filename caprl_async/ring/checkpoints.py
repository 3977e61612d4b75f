"""Checkpoint folders of a run: whole or not there, checked before use, the newest N kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from caprl_async.files import digest_file, sync_folder

MANIFEST = "manifest.json"
RING = "learner_group"
"""Folder of a checkpoint in which RLlib puts what the ring saves."""


def seal(folder: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Writes the manifest of a finished folder; `known` digests are not computed again."""
    known = known or {}
    files = {
        name: known.get(name) or digest_file(folder / name) for name in _files(folder) if name != MANIFEST
    }
    partial = folder / f".{MANIFEST}"
    partial.write_text(json.dumps(files, indent=1), encoding="utf-8")
    digest_file(partial)
    partial.replace(folder / MANIFEST)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST}: {error}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, was written with {size}"
        if digest_file(path)[1] != digest:
            return f"{path} is damaged: its checksum differs from {MANIFEST}"
    return None


class Checkpoints:
    """`folder` holds `step-000050`, ...: a name without a leading dot is a whole checkpoint."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it has its name."""
        return self.folder / f".partial-{step:06d}"

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of a step into."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, partial: Path, digests: Mapping[str, tuple[int, str]]) -> Path:
        """Gives it its final name and drops the oldest; `digests` are of its files that are known already.

        Later steps' are dropped too: the ring went back behind them, as they are damaged or by a restore.

        Raises:
            OSError: the disk is full.
        """
        seal(partial, digests)
        final = self.folder / partial.name.replace(".partial-", "step-")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(self.folder)
        every = self.all()
        kept = [folder for folder in every if step_of(folder) <= step_of(final)][-self._keep :]
        for folder in every:
            if folder not in kept:
                shutil.rmtree(folder)
        return final

    def abandon(self, partial: Path) -> None:
        """Removes what was begun and came to nothing."""
        shutil.rmtree(partial, ignore_errors=True)

    def all(self) -> list[Path]:
        """Every checkpoint, the oldest first."""
        return sorted(self.folder.glob("step-*"))

    def newest_sound(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is as it was written; `say` hears what is wrong with newer ones."""
        for folder in reversed(self.all()):
            wrong = problem(folder)
            if wrong is None:
                return folder
            say(f"{folder} cannot be used: {wrong}")
        return None


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(folder.name.removeprefix("step-"))


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
