"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A slow machine is no failure.
settings.register_profile("untimed")
settings.load_profile("untimed")
