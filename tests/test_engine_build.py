"""How much memory an engine takes, by its conf."""

from __future__ import annotations

import pytest

from caprl_async.config import EngineConfig
from caprl_async.engine.build import memory_arguments

GIB = 1 << 30


@pytest.mark.parametrize(
    ("kv_cache_gib", "on_cpu", "expected"),
    [
        (None, True, {"kv_cache_memory_bytes": GIB}),
        (0.125, True, {"kv_cache_memory_bytes": GIB // 8}),
        (None, False, {"gpu_memory_utilization": 0.3}),
        (2.0, False, {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2 * GIB}),
    ],
)
def test_memory_is_measured_only_where_nobody_says_how_much(
    kv_cache_gib: float | None, on_cpu: bool, expected: dict[str, float]
) -> None:
    config = EngineConfig(kv_cache_gib=kv_cache_gib, gpu_memory_utilization=0.3)
    assert memory_arguments(config, on_cpu=on_cpu) == expected
