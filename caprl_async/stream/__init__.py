"""Any number of images through models, by Ray Data: streaming, resumable, each row once in the output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from caprl_async.config import Config


@contextmanager
def on_ray(config: Config) -> Iterator[None]:
    """A Ray for the block; what `cluster.connect` raises."""
    from caprl_async.ring import cluster

    try:
        cluster.connect(config.ring, log_level=config.observe.log_level)
        hush(config.observe.log_level)
        yield
    finally:
        cluster.disconnect()


def hush(log_level: str) -> None:
    """Ray Data writes its own progress and every stage's plan; jobs show what a user follows.

    What a stage raises comes out as it is, not wrapped into Ray's own words.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    told = log_level if log_level in ("DEBUG", "INFO") else "CRITICAL"  # errors come out, and are told once
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # its file, in Ray's session folder, keeps everything
            handler.setLevel(told)
