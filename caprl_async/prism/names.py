"""Names of the files that an evaluation leaves in its run folder."""

from __future__ import annotations

RESULT = "result.json"
QUESTIONS = "scores.jsonl"
IMAGES = "images.jsonl"
EVALUATED = (RESULT, QUESTIONS, IMAGES)
"""The figures; a line per question; a line per image."""
