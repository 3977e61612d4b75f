"""What the control plane raises."""

from __future__ import annotations


class RingFailed(RuntimeError):
    """The ring cannot go on; the message names the actor and what to do."""
