"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from caprl_async.ring.supervisor import Supervisor

# As `engine.build` sets it before it imports vLLM, which another test of this process may have imported: its
# sampler would be compiled, and that needs a compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# A slow machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def stopped() -> Iterator[list[Supervisor]]:
    """Rings put in here are stopped after the test."""
    rings: list[Supervisor] = []
    yield rings
    from caprl_async.ring import cluster

    for ring in rings:
        ring.stop()
    cluster.disconnect()
