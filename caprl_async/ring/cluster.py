"""Starts a Ray of our own or joins a running one; the control plane under every actor."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Mapping
from typing import Any

from caprl_async.config import RingConfig
from caprl_async.ring.errors import RingFailed, RingLost


def connect(config: RingConfig, *, log_level: str, job: Mapping[str, str] | None = None) -> None:
    """Connects this process to Ray. A local Ray is guarded by a token that only its own processes hold.

    `job` is told to whoever looks at the cluster's jobs. Does nothing if the process is connected already (a
    Tune trial, a test's own cluster).

    Raises:
        RingFailed: Ray did not start, or could not be joined.
        RingLost: it did not start in time.
    """
    local = config.address == "local"
    if local and "RAY_AUTH_TOKEN" not in os.environ:
        # Given here, Ray neither makes a token of its own nor writes one to the home folder.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.job_config import JobConfig

    if ray.is_initialized():
        return
    # It announces as a warning that the token is in use, which is as it should be.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    own: dict[str, Any] = {
        "include_dashboard": config.dashboard,
        "object_store_memory": config.object_store_mb * 2**20,
    }
    level = getattr(logging, log_level)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=config.address,
            logging_level=level,
            log_to_driver=False,
            job_config=JobConfig(metadata=dict(job or {})),
            **(own if local else {}),
        )
    except Exception as error:  # of many kinds: missing packages, wrong tokens, other versions, no memory
        hint = "; ring.dashboard=true needs the package ray[default]" if local and config.dashboard else ""
        # A machine that is too busy is no fault of the conf: another driver may have more luck.
        kind = RingLost if "timed out" in str(error) else RingFailed
        raise kind(f"Ray could not be started, ring.address={config.address}: {error}{hint}") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)  # Ray puts in its own, which exits at once


def disconnect() -> None:
    """Ends what `connect` started; a joined cluster goes on without us."""
    import ray

    if ray.is_initialized():
        ray.shutdown(wait_for_processes=True)
