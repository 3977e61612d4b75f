"""Every conf key with type, default and explanation, read from config.py, for `--help` and the README."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from caprl_async.config import Config

USAGE = """\
python -m caprl_async.run conf=FILE [conf=FILE ...] [key=value ...]

  python -m caprl_async.run conf=conf/demo.yaml
  python -m caprl_async.run conf=conf/demo.yaml seed=1 steps=20 run_dir=runs/seed1
  python -m caprl_async.run conf=conf/demo.yaml replay.max_staleness=0      # the synchronous mode
  python -m caprl_async.run conf=conf/demo.yaml conf=conf/presets/gspo.yaml # another way to learn
  python -m caprl_async.run conf=runs/demo/conf.yaml resume=true            # go on with a run

  python -m caprl_async.run conf=conf/curate.yaml data.images=my/images questioner.model=... checker.model=...
  python -m caprl_async.run conf=conf/annotate.yaml data.images=my/images captioner.model=runs/demo/model
  python -m caprl_async.run conf=conf/evaluate.yaml prism.benchmark=chartqa prism.data=ChartQA_TEST.tsv ...

  python -m caprl_async.run conf=conf/report.yaml run=runs/demo             # report.html, also of a live run
  python -m caprl_async.run conf=conf/inspect.yaml run=runs/demo            # what a run has recorded
  python -m caprl_async.run conf=conf/inspect.yaml run=runs/demo sample=train/17@0#3   # a caption's life
  python -m caprl_async.run conf=conf/replay.yaml run=runs/demo             # train again on its batches

A conf is yaml; its line `base: other.yaml` names a conf (or a list of them) that it extends. Of several
confs, and of bases, the later one wins, and the command line wins over all. Paths are taken from the working
directory (then from the conf's folder); pkg:PATH lies in the installed package."""


@dataclass(frozen=True)
class Leaf:
    """One key of a conf."""

    key: str  # dotted
    type: Any
    default: Any
    help: str

    @property
    def default_text(self) -> str:
        """The default as one writes it in yaml."""
        if self.default is None or self.default == "":
            return "" if self.default == "" else "null"
        if isinstance(self.default, enum.Enum):
            return self.default.name
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return str(self.default).replace("\n", "\\n")


@cache
def leaves() -> tuple[Leaf, ...]:
    """All keys in the order of config.py, a room's own keys before those of rooms inside it."""
    return tuple(_leaves(Config, ""))


def _leaves(room: type, prefix: str) -> Iterator[Leaf]:
    hints = typing.get_type_hints(room)
    inner = []
    for field in dataclasses.fields(room):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            inner.append((hints[field.name], f"{key}."))
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        yield Leaf(key, hints[field.name], default, field.metadata["help"])
    for nested, nested_prefix in inner:
        yield from _leaves(nested, nested_prefix)


def room_of(config: Config, key: str) -> tuple[Any, str]:
    """The dataclass object that holds `key`, and the field's name."""
    *rooms, name = key.split(".")
    room: Any = config
    for part in rooms:
        room = getattr(room, part)
    return room, name


def flat(config: Config) -> dict[str, Any]:
    """Every key with its value, enums by name."""
    values = {leaf.key: value_of(config, leaf.key) for leaf in leaves()}
    return {key: value.name if isinstance(value, enum.Enum) else value for key, value in values.items()}


def value_of(config: Config, key: str) -> Any:
    room, name = room_of(config, key)
    return getattr(room, name)


def _rooms() -> Iterator[tuple[str, str, list[Leaf]]]:
    """(prefix, first sentence of the room's docstring, its keys)."""
    by_prefix: dict[str, list[Leaf]] = {}
    for leaf in leaves():
        by_prefix.setdefault(leaf.key.rpartition(".")[0], []).append(leaf)
    for prefix, keys in by_prefix.items():
        room: Any = Config
        for part in filter(None, prefix.split(".")):
            room = typing.get_type_hints(room)[part]
        yield prefix, (room.__doc__ or "").splitlines()[0], keys


def shipped_confs() -> list[Path]:
    """Confs, then presets, in `conf/` of the working directory, or of the source tree around the package."""
    for folder in (Path("conf"), Path(__file__).resolve().parent.parent / "conf"):
        found = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("presets/*.yaml"))]
        if found:
            return found
    return []


def help_text() -> str:
    """What `--help` prints: usage, the confs at hand, and one table per room."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    with console.capture() as capture:
        console.print(Text(USAGE), soft_wrap=True)
        confs = shipped_confs()
        if confs:
            console.print(Text("\nconfs:", style="bold"))
        for path in confs:
            console.print(Text(f"  {path}  {_first_comment(path)}"), soft_wrap=True)
        for prefix, doc, keys in _rooms():
            console.print(Text.assemble(f"\n{prefix or 'top level'}", ("  " + doc, "dim"), style="bold"))
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
            table.add_column(no_wrap=True)
            table.add_column(overflow="ellipsis", max_width=28)
            table.add_column(overflow="fold")
            for leaf in keys:
                name = Text(leaf.key, style="cyan")
                table.add_row(name, Text(_shorten(leaf.default_text, 28), style="green"), Text(leaf.help))
            console.print(table, end="")
    return capture.get()


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def markdown_table() -> str:
    """Every key as a Markdown table, for the README."""
    lines = ["| key | default | explanation |", "|---|---|---|"]
    for leaf in leaves():
        default = _shorten(leaf.default_text, 60)
        shown = f"`{_cell(default)}`" if default else ""
        lines.append(f"| `{leaf.key}` | {shown} | {_cell(leaf.help)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
