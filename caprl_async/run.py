"""The one entry point: `python -m caprl_async.run conf=conf/demo.yaml [key=value ...]`.

A training run has two processes of this program: the driver, which runs the job and is Ray's driver, and the
watchdog that has started it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.config import Config
from caprl_async.ring.errors import RingFailed, RingLost
from caprl_async.watchdog import INTERRUPTED, RESTART, Heartbeat, Watchdog, accept_signals

_WATCHED = ("train", "sft", "pretrain")
"""Jobs that can go on after a restart."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # A second signal must not break the clean-up that the first one began.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Runs the job that the conf names.

    Returns 0, 2 for a bad conf, 1 for a failure, 130 for Ctrl-C; a driver also 75: start it again.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        _help()
        return 0
    heartbeat = Heartbeat.of_environment()
    code = 1  # of an error that nobody explains
    try:
        code = _explained(arguments, is_driver=heartbeat is not None)
    finally:
        if heartbeat is not None:
            heartbeat.last_word(code)
    return code


def _help() -> None:
    try:
        print(conf.help_text(), flush=True)
    except BrokenPipeError:  # `--help | head` ends quietly; what is left is flushed into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(arguments: list[str], is_driver: bool) -> int:
    run_dir = ""
    try:
        config = conf.load(arguments)
        run_dir = config.run_dir
        if config.job in _WATCHED and not is_driver:
            return Watchdog(config.ring, Path(run_dir), _commands(config, arguments)).run()
        _job(config)
    except KeyboardInterrupt:
        print("stopped; everything this run started has been ended", file=sys.stderr)
        return INTERRUPTED
    except ConfError as error:
        print(f"conf error: {error}", file=sys.stderr)
        return 2
    except (RingFailed, TimeoutError) as error:
        go_on = f"; go on with: resume=true run_dir={run_dir}" if conf.has_checkpoint(Path(run_dir)) else ""
        print(f"error: {error}{go_on}", file=sys.stderr)
        return RESTART if isinstance(error, RingLost) else 1
    except OSError as error:
        where = "" if error.filename or not run_dir else f" (run_dir={run_dir})"
        print(f"error: {error}{where}", file=sys.stderr)
        return 1
    return 0


def _job(config: Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # checkpoints are folders; nothing is fetched
    accept_signals(_interrupt)
    importlib.import_module(f"caprl_async.jobs.{config.job}").run(config)


def _commands(config: Config, arguments: list[str]) -> Callable[[bool], list[str]]:
    """The driver's command lines: for the first start, and for those that go on with what it has begun."""
    folder = Path(config.run_dir)
    ours = config.resume or not conf.has_run(folder)  # else the driver refuses it

    def command(again: bool) -> list[str]:
        driver = [sys.executable, "-m", "caprl_async.run"]
        if not (again and ours and conf.has_run(folder)):
            return [*driver, *arguments]
        if conf.is_resolved(config, folder):  # the files that it came from may have been edited since
            return [*driver, f"conf={folder / conf.RESOLVED}", "resume=true"]
        return [*driver, *arguments, "resume=true"]

    return command


if __name__ == "__main__":
    sys.exit(main())
