"""Watches metrics for leaving their declared bands (`observe.bands`); between the ring and whoever reads.

An alarm begins when a metric leaves its band and ends when it is back; both are lines of `alarms.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caprl_async.config import BandsConfig
from caprl_async.observe.metrics import read_lines

ALARMS = "alarms.jsonl"


class Alarms:
    """The alarms of one run."""

    def __init__(self, bands: BandsConfig, run_dir: Path | str) -> None:
        self._bands = {
            f.name: values for f in dataclasses.fields(bands) if (values := getattr(bands, f.name))
        }
        self._path = Path(run_dir) / ALARMS
        self._raised: set[str] = set()

    @property
    def raised(self) -> int:
        """How many metrics are outside their bands now."""
        return len(self._raised)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """A sentence for each alarm that begins or ends at this step. A metric that is absent or NaN, as one
        of fresh tokens where there are none, changes nothing; an infinite one is outside."""
        said = []
        for name, (low, high) in self._bands.items():
            value = metrics.get(name, math.nan)
            if math.isnan(value):
                continue
            inside = low <= value <= high
            if inside == (name not in self._raised):
                continue
            (self._raised.discard if inside else self._raised.add)(name)
            self._keep({"step": step, "metric": name, "value": value, "band": [low, high], "inside": inside})
            where = "back in" if inside else "outside"
            said.append(
                f"step {step}: {name} is {value:.4g}, {where} observe.bands.{name}=[{low:g}, {high:g}]"
            )
        return said

    def _keep(self, line: dict[str, Any]) -> None:
        if not math.isfinite(line["value"]):
            line = {**line, "value": str(line["value"])}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_alarms(run_dir: Path | str) -> list[dict[str, Any]]:
    """Every beginning and end of an alarm, in order."""
    return read_lines(Path(run_dir) / ALARMS)
