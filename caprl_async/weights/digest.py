"""Compares the learner's weights with an engine's without moving either: one digest per tensor."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's values in its own dtype; -0.0 counts as 0.0."""
    import torch

    plain = (tensor.detach().cpu() + 0.0).contiguous()
    return hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
