"""Evaluations side by side: one JSON file and one page, from the run folders that job=evaluate has left."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.files import write_json
from caprl_async.jobs.evaluate import table
from caprl_async.prism import page
from caprl_async.prism.compare import as_json, sides
from caprl_async.prism.runs import read_run
from caprl_async.stream.stage import explained


def run(config: Config) -> None:
    """
    Raises:
        ConfError: a run cannot be read, or they do not measure the same.
    """
    console = Console(stderr=True)
    with conf.run_folder(config) as folder:
        with explained():
            found = sides([read_run(Path(one)) for one in config.compare.runs], config.seed)
        write_json(folder / "compare.json", as_json(found))
        path = page.write(found, folder / "compare.html", config.compare.images)
        console.print(table(found, str(found[0].run.result["benchmark"])))
        console.print(f"{len(found)} runs compared: {path}", markup=False, soft_wrap=True)
