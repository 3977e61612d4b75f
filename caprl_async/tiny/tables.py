"""Real numbers for the bar charts: columns of `vega_datasets`, ranked into five levels."""

from __future__ import annotations

import json
from pathlib import Path

LEVELS = 5
TABLES_FILE = Path(__file__).parent / "data" / "tables.json"
_COLUMNS = {
    "barley": "yield",
    "cars": "Miles_per_Gallon",
    "driving": "gas",
    "iowa_electricity": "net_generation",
    "seattle_weather": "temp_max",
    "sf_temps": "temp",
    "stocks": "price",
    "wheat": "wheat",
}


def extract_tables(rows: int = 60) -> dict[str, list[float]]:
    """Reads `rows` evenly spaced values of each column from `vega_datasets`, rows in the table's order."""
    from vega_datasets import local_data

    tables = {}
    for name, column in _COLUMNS.items():
        series = getattr(local_data, name)()[column].dropna()
        step = max(1, len(series) // rows)
        tables[f"{name}.{column}"] = [float(value) for value in series.iloc[::step][:rows]]
    return tables


def load_levels(path: Path = TABLES_FILE) -> dict[str, list[int]]:
    """Levels 1..5 per column, by rank: every level is as frequent as the others, so guessing does not pay."""
    levels = {}
    for name, values in json.loads(path.read_text()).items():
        order = sorted(range(len(values)), key=lambda row: (values[row], row))
        column = [0] * len(values)
        for rank, row in enumerate(order):
            column[row] = 1 + rank * LEVELS // len(values)
        levels[name] = column
    return levels


if __name__ == "__main__":
    TABLES_FILE.parent.mkdir(parents=True, exist_ok=True)
    TABLES_FILE.write_text(json.dumps(extract_tables(), indent=None) + "\n")
