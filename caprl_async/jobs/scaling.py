"""`scale.yaml` in a run's folder: how many rollouts and judges its user wants while it goes on."""

from __future__ import annotations

from pathlib import Path

import msgspec

SCALE = "scale.yaml"


class ScaleError(ValueError):
    """The file cannot be followed; the message says why."""


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers of actors, those that the ring has started with included; None: as before."""

    rollouts: int | None = None
    judges: int | None = None


class ScaleFile:
    """Reads the file again whenever it has changed."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / SCALE
        self._seen: bytes | None = None

    def news(self) -> Wanted | None:
        """What it says, if it says something new.

        Raises:
            ScaleError: it cannot be read. The same fault is raised once.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ScaleError(f"{self.path}: {error.strerror}") from error
        if data == self._seen:
            return None
        self._seen = data
        try:
            return msgspec.yaml.decode(data, type=Wanted)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ScaleError(
                f"{self.path}: {error}; write `rollouts: 3` and `judges: 2`, each on a line of its own"
            ) from error
