"""Values that no key of a conf may have, whatever it means; part of conf_checks.py."""

from __future__ import annotations

import math
from typing import Any

_WHOLE = 2**63
"""Whole numbers stay below this: torch, numpy and SQLite hold no greater ones."""


def problem(key: str, value: Any) -> str | None:
    """What is wrong with the value; None if a key may have it."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key}={value} must be a finite number"
    if isinstance(value, int) and not -_WHOLE <= value < _WHOLE:
        return f"{key} must be a whole number below 2^63"
    if isinstance(value, str) and not _is_unicode(value):
        return f"{key}={value!r} must be Unicode text: it is written to files and sent to the actors"
    if isinstance(value, list):
        return next((found for entry in value if (found := _entry_problem(key, entry))), None)
    return None


def _entry_problem(key: str, entry: Any) -> str | None:
    """An infinite edge of a band is one that is not there."""
    return None if entry in (math.inf, -math.inf) else problem(key, entry)


def _is_unicode(text: str) -> bool:
    """False for halves of UTF-16 pairs, which Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
