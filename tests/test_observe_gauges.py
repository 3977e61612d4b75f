"""A run's metrics in Ray, as Prometheus reads them and Grafana shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request

import pytest
from tool_kit import load_tool

from caprl_async.config import RingConfig
from caprl_async.observe import names
from caprl_async.observe.gauges import ROWS, Gauges, dashboard, metric_name
from caprl_async.ring import cluster


def shown() -> set[str]:
    """Metrics that the dashboard shows."""
    return {name for row in ROWS.values() for panel in row for name in panel.curves}


def test_the_dashboard_is_the_committed_one() -> None:
    module = load_tool("grafana")
    assert module.PATH.read_text(encoding="utf-8") == module.text(), "run: python tools/grafana.py"


def test_every_chart_asks_for_metrics_that_exist() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert set(asked) == {f'ray_{metric_name(name)}{{run=~"$run"}}' for name in shown()}
    taken = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(taken)) == len(taken), "no chart lies on another"
    told = {*names.QUEUE.values(), names.REWARD, names.CAPTIONS_PER_S, names.STALENESS, names.SYNC_S}
    assert told <= shown()


def test_names_are_such_as_prometheus_takes() -> None:
    assert metric_name("reward_mean") == "caprl_reward_mean"
    assert re.fullmatch(r"\w+", metric_name("restarts.rollout-0"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_scrape_has_them() -> None:
    cluster.connect(RingConfig(), log_level="ERROR")
    try:
        _scraped()
    finally:
        cluster.disconnect()


def _scraped() -> None:
    import ray

    gauges = Gauges("one")
    gauges.set({"reward_mean": 0.25, "kl": None, "loss": float("nan"), "queue_ready": 3})
    gauges.set({"reward_mean": 0.5})
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while "reward_mean" not in found and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        found = {
            match[1]: float(match[2])
            for match in re.finditer(r'^ray_caprl_(\w+)\{[^}]*run="one"[^}]*\} (\S+)$', text, re.MULTILINE)
        }
    assert found == {"reward_mean": 0.5, "queue_ready": 3.0}, json.dumps(found)
