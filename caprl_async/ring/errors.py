"""What the control plane raises."""

from __future__ import annotations


class RingFailed(RuntimeError):
    """The ring cannot go on; the message names the actor and what to do."""


class RingLost(RingFailed):
    """Ray itself is gone, and every actor with it: only a new driver can go on, from the last checkpoint."""


class ActorLost(RingFailed):
    """An actor that Ray starts again has died, or has been started again and knows nothing yet."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is gone: {reason}")
        self.name = name


class LearnersLost(RingFailed):
    """A learner rank has died: the gang must be started again and go back to a checkpoint."""


class SaveFailed(RingFailed):
    """A checkpoint was not written; training is not harmed."""
