"""The one entry point: `python -m caprl_async.run conf=conf/demo.yaml [key=value ...]`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

from caprl_async.conf import ConfError, help_text, load
from caprl_async.ring.errors import RingFailed


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # A second signal must not break the clean-up that the first one began.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Runs the job that the conf names. Returns 0, 2 for a bad conf, 1 for a failure, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
        print(help_text())
        return 0
    try:
        config = load(arguments)
    except ConfError as error:
        print(f"conf error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # checkpoints are folders; nothing is fetched
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        importlib.import_module(f"caprl_async.jobs.{config.job}").run(config)
    except KeyboardInterrupt:
        print("stopped; everything this run started has been ended", file=sys.stderr)
        return 130
    except ConfError as error:
        print(f"conf error: {error}", file=sys.stderr)
        return 2
    except (RingFailed, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = "" if error.filename else f" (run_dir={config.run_dir})"
        print(f"error: {error}{where}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
