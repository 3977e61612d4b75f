"""Any number of images through models, by Ray Data: streaming, resumable, each row once in the output."""

from __future__ import annotations

import logging


def hush(log_level: str) -> None:
    """Ray Data writes its own progress and every stage's plan; jobs show what a user follows."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # its file, in Ray's session folder, keeps everything
            handler.setLevel(log_level)
