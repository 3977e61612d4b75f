"""Writes cluster/grafana.json, the Grafana dashboard of a run, from `caprl_async.observe.gauges`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from caprl_async.observe.gauges import dashboard

PATH = Path(__file__).resolve().parent.parent / "cluster" / "grafana.json"


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Returns 0."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PATH.write_text(text(), encoding="utf-8")
    print(f"{PATH}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
