"""A run's metrics as Ray's: `ray_caprl_<name>` for Prometheus, the Ray dashboard and Grafana.

Each step's metrics are gauges with the run's name as a tag, set by the driver. PANELS is what the Grafana
dashboard (cluster/grafana.json, made by tools/grafana.py) shows of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "caprl_"
TAG = "run"


@dataclass(frozen=True)
class Panel:
    """One chart: what it shows, in which of Grafana's units, and how the curves are called."""

    title: str
    unit: str
    curves: Mapping[str, str]  # metric -> legend
    what: str = ""


ROWS: Mapping[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel("Reward", "percentunit", {"reward_mean": "batch", "heldout_score": "held out"}),
        Panel(
            "QA accuracy",
            "percentunit",
            {"accuracy_fact_mean": "what is there", "accuracy_absent_mean": "what is not"},
        ),
        Panel(
            "Parts of the reward",
            "short",
            {"reward_length_mean": "length", "reward_format_mean": "format", "reward_cost_mean": "cost"},
        ),
        Panel("Caption length", "short", {"caption_length_mean": "tokens"}),
        Panel("Loss and gradient", "short", {"loss": "loss", "grad_norm": "gradient norm"}),
        Panel("Entropy and KL", "short", {"entropy": "entropy", "kl_behaviour": "KL to the sampler"}),
    ),
    "The ring": (
        Panel("Throughput", "cps", {"captions_per_s": "captions trained"}),
        Panel(
            "Idle",
            "percentunit",
            {"idle_rollout": "rollouts", "idle_judge": "judges"},
            "Share of the time in which a stage had nothing to do.",
        ),
        Panel(
            "Groups on their way",
            "short",
            {
                "queue_generating": "generating",
                "queue_waiting_judge": "to judge",
                "queue_judging": "judging",
                "queue_ready": "ready",
            },
        ),
        Panel("Staleness", "short", {"staleness_mean": "mean", "staleness_max": "oldest token"}),
        Panel(
            "Learner",
            "s",
            {"learner_step_s": "step", "learner_wait_s": "waits", "snapshot_s": "snapshot"},
        ),
        Panel("Actors", "short", {"alive_rollout": "rollouts", "alive_judge": "judges"}),
        Panel("Weight sync", "s", {"weight_sync_s": "whole", "weight_sync_pause_s": "engines pause"}),
    ),
    "Trust": (
        Panel(
            "Log-probabilities, engine against learner",
            "short",
            {"logprob_gap_fresh_mean": "fresh tokens", "logprob_gap_mean": "all tokens"},
        ),
        Panel(
            "Importance weights",
            "short",
            {
                "importance_mean": "mean",
                "importance_bounded": "share bounded",
                "effective_samples": "effective",
            },
        ),
        Panel(
            "Judge",
            "short",
            {
                "missing_share": "without a score",
                "off_options_mean": "off the options",
                "abstain_share": "abstains",
                "judge_outages": "outages",
            },
        ),
        Panel(
            "Signs of reward hacking",
            "short",
            {
                "hack_answer_leak": "speaks of answers",
                "hack_question_echo": "repeats questions",
                "hack_repetition": "repeats itself",
                "hack_meta": "speaks of itself",
                "hack_truncated": "cut",
            },
        ),
        Panel("Held out against training", "short", {"gap_heldout": "images", "gap_judges": "judges"}),
        Panel(
            "What went wrong",
            "short",
            {
                "alarms": "alarms",
                "failed_retries": "failed groups",
                "retried_stale": "stale groups",
                "evicted_filtered": "filtered groups",
            },
        ),
    ),
}


class Gauges:
    """`set` publishes a step's metrics; Ray must be connected."""

    def __init__(self, run: str) -> None:
        self._tags = {TAG: run}
        self._gauges: dict[str, Any] = {}

    def set(self, metrics: Mapping[str, float | None]) -> None:
        """The finite numbers of a step; what has no value keeps its last one."""
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._gauge(name).set(float(value), tags=self._tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            described = f"{name} of the last step (README: How it learns)"
            self._gauges[name] = Gauge(metric_name(name), description=described, tag_keys=(TAG,))
        return self._gauges[name]


def metric_name(name: str) -> str:
    """What a metric is called in Ray, which puts `ray_` before it."""
    return PREFIX + re.sub(r"\W", "_", name)


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, charts in ROWS.items():
        panels.append(_row(len(panels) + 1, row, y))
        y += 1
        for index, chart in enumerate(charts):
            panels.append(_chart(len(panels) + 1, chart, x=8 * (index % 3), y=y + 7 * (index // 3)))
        y += 7 * math.ceil(len(charts) / 3)
    source = {"type": "prometheus", "uid": "${datasource}"}
    query = f"label_values(ray_{metric_name('reward_mean')}, {TAG})"
    return {
        "uid": "caprl-async",
        "title": "caprl_async",
        "tags": ["ray", "caprl"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "source"},
                {
                    "name": TAG,
                    "type": "query",
                    "label": TAG,
                    "datasource": source,
                    "query": {"query": query, "refId": "runs"},
                    "definition": query,
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": 24, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _chart(number: int, panel: Panel, *, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": source,
        "gridPos": {"h": 7, "w": 8, "x": x, "y": y},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": {"lineWidth": 2, "fillOpacity": 0, "spanNulls": True}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": source,
                "expr": f'ray_{metric_name(name)}{{{TAG}=~"${TAG}"}}',
                "legendFormat": f"{legend} {{{{{TAG}}}}}",
            }
            for index, (name, legend) in enumerate(panel.curves.items())
        ],
    }
