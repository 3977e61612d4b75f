"""Writes a run's checkpoints beside its steps; what goes wrong costs a checkpoint and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from caprl_async.ring.checkpoints import RING
from caprl_async.ring.errors import SaveFailed
from caprl_async.ring.supervisor import Supervisor


class Keeper:
    """`write(folder)` begins a checkpoint in a folder, as `Supervisor.save` does without `wait`.

    The last of `steps` is kept in any case, and whole before it counts as done; `run_dir/model` leads to the
    newest weights.
    """

    def __init__(
        self,
        ring: Supervisor,
        run_dir: Path,
        steps: int,
        write: Callable[[Path], object],
        say: Callable[[str], None],
    ) -> None:
        self._ring = ring
        self._run_dir = run_dir
        self._steps = steps
        self._write = write
        self._say = say
        self._interval = ring.config.checkpoint.interval
        self._writing: Path | None = None

    def after(self, step: int) -> None:
        """Call it when a step is done.

        Raises:
            SaveFailed: it was the last step's: the result would be lost.
        """
        self._saved(wait=False)
        if step % self._interval == 0 or step == self._steps:
            self._save(step)
        if step == self._steps:  # a learner that dies now, and goes back, trains up to here again
            self._saved(wait=True)

    def _save(self, step: int) -> None:
        self._saved(wait=True)
        self._writing = self._ring.checkpoints.begin(step)
        try:
            self._write(self._writing.resolve())
        except (SaveFailed, OSError) as error:
            self._not_saved(error)

    def _saved(self, *, wait: bool) -> None:
        """Gives a checkpoint its name once it is whole, so that a folder with a final name is a whole one."""
        if self._writing is None:
            return
        try:
            digests = self._ring.saved(wait=wait)
            if digests is None:
                return
            named = {f"{RING}/{name}": digest for name, digest in digests.items()}
            final = self._ring.checkpoints.finish(self._writing, named)
        except (SaveFailed, OSError) as error:
            self._not_saved(error)
            return
        self._writing = None
        self._ring.trim()
        link = self._run_dir / "model"
        link.unlink(missing_ok=True)
        link.symlink_to((final / RING / "hf").relative_to(self._run_dir))

    def _not_saved(self, error: Exception) -> None:
        partial, self._writing = self._writing, None
        if partial is not None:
            self._ring.checkpoints.abandon(partial)
        last = partial == self._ring.checkpoints.partial(self._steps)
        if last and self._ring.version.step == self._steps:  # else the learner goes back and comes again
            raise SaveFailed(f"the result could not be saved: {error}") from error
        self._say(f"no checkpoint this time: {error}")
