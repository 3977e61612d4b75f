"""Reads a conf: yaml files that extend each other, then `key=value`, into one checked `Config`.

Stands before the ring: whatever is wrong with a conf is one `ConfError` here, before anything starts.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import fcntl
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caprl_async import conf_checks, conf_files, conf_help
from caprl_async.conf_bounds import WRITERS
from caprl_async.conf_checks import ConfError
from caprl_async.config import Config
from caprl_async.observe.names import METRICS

__all__ = [
    "ConfError",
    "check_machine",
    "dump",
    "from_mapping",
    "has_checkpoint",
    "has_run",
    "help_text",
    "is_going_on",
    "is_resolved",
    "load",
    "markdown_table",
    "read",
    "resolve_path",
    "run_folder",
    "to_yaml",
]

help_text = conf_help.help_text
markdown_table = conf_help.markdown_table
check_machine = conf_checks.check_machine
has_checkpoint = conf_files.has_checkpoint
has_run = conf_files.has_run

RESOLVED = "conf.yaml"
"""Name of the resolved conf in a run folder."""

_PACKAGE = Path(__file__).resolve().parent
_WRITTEN = ("run_dir", "data.image_dir")  # paths that the run makes; all other paths must exist
_WRITERS = tuple(f"{who}.model" for who in WRITERS)
_INPUTS = (
    *("run", "data.images", "prism.data", "prism.captions_from"),
    *("curate.questions_from", "curate.exclude", "sft.data", "sft.validation"),
    *(f"pretrain.{stage}.{name}" for stage in conf_files.STAGES for name in ("data", "validation")),
)
_READ = (*_INPUTS, *_WRITERS, *conf_files.INPUT_FILES, *conf_files.INPUT_MODELS, conf_files.FURTHER_JUDGES)
_SHOWN = 200  # characters of a wrong key or value
_UNFIT = (OmegaConfBaseException, ValueError, OverflowError)
"""What OmegaConf raises at a value of a wrong type; ValueError: one of thousands of digits, which it cannot
print; OverflowError: one beyond all floats."""
_UNREADABLE = (*_UNFIT, OSError, LookupError, TypeError, RecursionError, yaml.YAMLError)
"""And at broken text, with yaml; LookupError: a key of brackets alone; TypeError: a key within a list."""


@dataclass(frozen=True)
class _Layer:
    """One source of keys: a conf file, or the command line."""

    name: str
    values: dict[str, Any]  # nested, as written
    folder: Path | None  # of the file


def load(argv: list[str]) -> Config:
    """The checked conf of a command line `conf=FILE [conf=FILE ...] [key=value ...]`; paths are absolute.

    Raises:
        ConfError: anything that would not run; the message names the key and, where there is one, the fix.
    """
    paths, overrides = _split_arguments(argv)
    config = read(paths, overrides)
    conf_checks.check(config)
    return config


def read(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Like `load`, for keys and types alone: neither values nor files are checked. Later files win.

    Raises:
        ConfError: an unknown key, a wrong type, a conf that cannot be read.
    """
    files = [layer for path in paths for layer in _file_layers(path)]
    layers = [*files, _Layer("the command line", _parse_dotlist(overrides), None)]
    config, sources = _merge(layers)
    _resolve_paths(config, sources)
    return config


def from_mapping(values: dict[str, Any]) -> Config:
    """The conf of a nested dictionary, over the defaults; keys, types and paths as `read` takes them.

    Raises:
        ConfError: an unknown key or a wrong type.
    """
    config, sources = _merge([_Layer("the configuration", values, None)])
    _resolve_paths(config, sources)
    return config


def dump(config: Config, path: Path) -> None:
    """Writes a conf that `load` reads back to an equal `Config`."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """The whole conf as yaml, enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return yaml.dump(container, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def is_resolved(config: Config, folder: Path) -> bool:
    """Whether a run folder's conf.yaml was written for this very conf."""
    path = folder / RESOLVED
    return path.is_file() and path.read_text(encoding="utf-8") == to_yaml(_unresumed(config))


def _unresumed(config: Config) -> Config:
    return dataclasses.replace(config, resume=False)


class _Dumper(yaml.SafeDumper):
    """Escapes Unicode's line breaks in texts: unescaped, yaml would read them back as plain ones."""

    def text(self, text: str) -> yaml.ScalarNode:
        breaks = any(sign in text for sign in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.text)


@contextmanager
def run_folder(config: Config) -> Iterator[Path]:
    """Makes the run folder, writes the resolved conf into it and keeps other runs out until the end.

    Raises:
        ConfError: a run is going on in the folder, or it holds one and `resume` is false, or it cannot be
            written.
    """
    folder = Path(config.run_dir)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(folder.stat().st_mode & 0o770)  # not for the whole world to read
        lock = (folder / ".lock").open("w")
    with lock:
        _lock(lock, folder)
        if (folder / METRICS).exists() and not config.resume:  # it has begun to train
            resume, delete = "go on with it by resume=true", "delete it (it has no checkpoint)"
            way = resume if has_checkpoint(folder) else delete
            raise ConfError(f"run_dir={folder} already holds a run; {way}, or choose another run_dir=...")
        with _writing(folder):
            dump(_unresumed(config), folder / RESOLVED)
        yield folder


def is_going_on(folder: Path) -> bool:
    """Whether a run holds this folder now."""
    try:
        with (folder / ".lock").open("r+") as lock:
            _lock(lock, folder)
    except ConfError:
        return True
    except OSError:  # nothing has ever run here, or it is not ours to lock
        return False
    return False


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfError(f"run_dir={folder} cannot be written: {error.strerror}") from error


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfError(f"a run is going on in run_dir={folder}; choose another run_dir=...") from None
    except OSError:
        return  # a file system without locks: nobody can be kept out


def resolve_path(text: str, folder: Path | None = None) -> str:
    """An absolute path. `pkg:x` lies in the installed package; a relative path is taken from the working
    directory, or from `folder` (of the conf that names it) if it exists only there.

    Raises:
        ConfError: no path can have this text (too long, a zero byte, no such user).
    """
    try:
        if text.startswith("pkg:"):
            return str(_PACKAGE / text.removeprefix("pkg:"))
        path = Path(text).expanduser()
        if not path.exists() and folder is not None and (folder / path).exists():
            path = folder / path
        return str(path.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfError(f"{_shown(text)} is no path: {_plain(str(error))}") from error


# ---------------------------------------------------------------- reading


def _split_arguments(argv: list[str]) -> tuple[list[Path], list[str]]:
    for argument in argv:
        if "=" not in argument or argument.startswith("-"):
            shown = argument.lstrip("-")
            hint = shown if "=" in shown else f"{shown.replace(' ', '=')}=..."
            raise ConfError(f"'{argument}' is not of the form key=value; did you mean {hint}?")
    paths = [a.removeprefix("conf=") for a in argv if a.startswith("conf=")]
    if not paths or not all(paths):
        raise ConfError(f"conf= is missing; name a conf file, for example conf={_example_conf()}")
    return [Path(path) for path in paths], [a for a in argv if not a.startswith("conf=")]


def _example_conf() -> str:
    found = conf_help.shipped_confs()
    return str(found[0]) if found else "conf/demo.yaml"


def _file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[_Layer]:
    """The file's own layer last; what it extends comes before it."""
    try:
        path = Path(resolve_path(str(path)))
    except ConfError as error:
        raise ConfError(f"base: {error} (in {seen[-1]})" if seen else f"conf={error}") from error
    if path in seen:
        raise ConfError("base: goes in a circle: " + " -> ".join(str(p) for p in (*seen, path)))
    if not path.is_file():
        where = f" (base of {seen[-1]})" if seen else ""
        raise ConfError(f"conf={path} is no file{where}{_nearest_file(path)}")
    values = _read_yaml(path)
    base = values.pop("base", None)
    named = [base] if isinstance(base, str) else base or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfError(f"base={base!r} in {path} is neither a path nor a list of paths")
    below: list[_Layer] = []
    for name in named:
        relative = name if name.startswith(("pkg:", "~")) else str(path.parent / name)
        below += _file_layers(Path(relative), (*seen, path))
    return [*below, _Layer(str(path), values, path.parent)]


def _nearest_file(path: Path) -> str:
    candidates = {p.name: p for p in (*path.parent.glob("*.y*ml"), *conf_help.shipped_confs())}
    name = path.name if path.suffix else f"{path.name}.yaml"
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean conf={candidates[close[0]]}?" if close else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfError(f"{path}{line} is not valid yaml: {error.problem}") from error
    except _UNREADABLE as error:
        raise ConfError(f"{path} cannot be read as yaml: {_plain(str(error))}") from error
    if not isinstance(values, dict):
        raise ConfError(f"{path} holds no `key: value` lines")
    return {str(name): value for name, value in values.items()}


def _parse_dotlist(overrides: Sequence[str]) -> dict[str, Any]:
    read = OmegaConf.create()
    for override in overrides:
        try:
            read.merge_with_dotlist([override])
        except _UNREADABLE as error:
            raise ConfError(f"cannot read {_shown(override)}: {_plain(str(error))}") from error
    values = OmegaConf.to_container(read, resolve=False)
    assert isinstance(values, dict)
    if "base" in values:
        raise ConfError("base= works in a conf file only; on the command line name the conf by conf=")
    return {str(name): value for name, value in values.items()}


# ---------------------------------------------------------------- merging


def _merge(layers: list[_Layer]) -> tuple[Config, dict[str, _Layer]]:
    """The layers over the defaults, later ones winning, and the layer each key came from."""
    tree = copy.deepcopy(_defaults())
    sources: dict[str, _Layer] = {}
    problems: list[str] = []
    known = {leaf.key: leaf for leaf in conf_help.leaves()}
    for layer in layers:
        for key, value in _flatten(layer.values, Config, "", layer.name, problems):
            if value is None and known[key].type is str:
                value = ""  # `key:` and `key=` with nothing after them
            try:
                OmegaConf.update(tree, key, value, merge=False)
            except _UNFIT:
                problems.append(_wrong_type(key, value, known[key].type, layer.name))
            sources[key] = layer
    if problems:
        raise ConfError.of(problems)
    try:
        config = OmegaConf.to_object(tree)
    except _UNFIT as error:  # an interpolation that leads nowhere, or to a wrong type
        key = getattr(error, "full_key", None) or ", ".join(key for key in sources if _refers(tree, key))
        raise ConfError(f"{key}: {_plain(str(error).splitlines()[0])}") from error
    assert isinstance(config, Config)
    return config, sources


def _refers(tree: DictConfig, key: str) -> bool:
    """True if the key's value is an interpolation."""
    room, _, name = key.rpartition(".")
    return OmegaConf.is_interpolation(OmegaConf.select(tree, room) if room else tree, name)


@cache
def _defaults() -> DictConfig:
    """Taking the dataclasses apart is most of the time that a conf takes to read."""
    return OmegaConf.structured(Config)


def _flatten(
    values: dict[str, Any], room: type, prefix: str, source: str, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every known key in `values`; what is not known is added to `problems`."""
    hints = typing.get_type_hints(room)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(_unknown(prefix, _plain(str(name)) or "''", room, source))
        elif not dataclasses.is_dataclass(hints[name]):
            yield key, value
        elif isinstance(value, dict):
            yield from _flatten(value, hints[name], f"{key}.", source, problems)
        elif value is not None:  # a section whose keys are all commented out is null
            inner = ", ".join(f.name for f in dataclasses.fields(hints[name]))
            problems.append(f"{key}={_shown(value)} in {source}: {key} is a section with the keys {inner}")


def _unknown(prefix: str, name: str, room: type, source: str) -> str:
    return f"unknown key {prefix}{name} in {source}; did you mean {_nearest_key(prefix, name, room)}?"


def _nearest_key(prefix: str, name: str, room: type) -> str:
    """The same name in another room, else a similar one in this room, else one whose help holds it."""
    key = f"{prefix}{name}"
    leaves = conf_help.leaves()
    siblings = [f"{prefix}{field.name}" for field in dataclasses.fields(room)]
    every = [leaf.key for leaf in leaves]
    words = name.replace("_", " ")
    candidates = (
        [k for k in every if k.rpartition(".")[2] == name]
        or difflib.get_close_matches(key, siblings, n=1, cutoff=0.8)
        or [leaf.key for leaf in leaves if leaf.key in siblings and words in leaf.help]
        or difflib.get_close_matches(key, every, n=1, cutoff=0.8)
        or [leaf.key for leaf in leaves if len(words) > 3 and words in leaf.help]
        or siblings + every
    )
    return max(candidates, key=lambda k: difflib.SequenceMatcher(None, k, key).ratio())


def _wrong_type(key: str, value: Any, wanted: Any, source: str) -> str:
    head = f"{key}={_shown(value)} in {source}"
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if isinstance(kinds[0], enum.EnumMeta):
        names = [*kinds[0].__members__, *(["null"] if types.NoneType in kinds else [])]
        close = difflib.get_close_matches(_shown(value).strip("'"), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{head} is none of {' | '.join(names)}{hint}"
    return f"{head} is not {describe_type(wanted)}"


def _shown(value: Any) -> str:
    """A wrong value, cut short; Python writes no number of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(text: str) -> str:
    """A wrong text that any terminal can print."""
    return text[:_SHOWN].encode("utf-8", "backslashreplace").decode()


def describe_type(wanted: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if wanted in words:
        return words[wanted]
    if isinstance(wanted, types.UnionType):
        inner = [describe_type(t) for t in typing.get_args(wanted) if t is not types.NoneType]
        return " or ".join([*inner, "null"])
    if typing.get_origin(wanted) is list:
        (item,) = typing.get_args(wanted)
        return f"a list of which each entry is {describe_type(item)}"
    return str(wanted)


def _resolve_paths(config: Config, sources: dict[str, _Layer]) -> None:
    for key in (*_WRITTEN, *_READ):
        value = conf_help.value_of(config, key)
        if value:
            source = sources.get(key)
            folder = source.folder if source is not None and key in _READ else None
            room, name = conf_help.room_of(config, key)
            try:
                one = isinstance(value, str)
                resolved = resolve_path(value, folder) if one else [resolve_path(v, folder) for v in value]
                setattr(room, name, resolved)
            except ConfError as error:
                raise ConfError(f"{key}={error}") from error
