"""Drivers in small for test_watchdog.py, and a watchdog that runs them: no Ray, but the same processes.

    fake_driver.py watch FOLDER RESTARTS HANG_S PLAN...   watches
    fake_driver.py FOLDER PLAN...                          is a driver

A plan's n-th word is what the n-th driver does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from caprl_async.config import RingConfig
from caprl_async.run import _interrupt
from caprl_async.watchdog import INTERRUPTED, Heartbeat, Watchdog, accept_signals


def watch(folder: Path, restarts: int, hang_s: float, plan: list[str]) -> int:
    ring = RingConfig(driver_restarts=restarts, hang_timeout_s=hang_s)

    def command(again: bool) -> list[str]:
        return [sys.executable, __file__, str(folder), *plan, *(["resume=true"] if again else [])]

    return Watchdog(ring, folder, command).run()


def drive(folder: Path, plan: list[str]) -> int:
    heartbeat = Heartbeat.of_environment()
    assert heartbeat is not None
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "arguments": sys.argv[2:]}) + "\n")
    turn = len((folder / "starts.jsonl").read_text().splitlines()) - 1
    code = _act(folder, plan[turn], turn)
    heartbeat.last_word(code)
    if plan[turn] == "crash-at-exit":
        os.abort()
    return code


def _act(folder: Path, word: str, turn: int) -> int:
    if word == "late":  # deaf to signals for a while, as during imports
        time.sleep(1.0)
    try:
        accept_signals(_interrupt)
        if word in ("wait", "late"):
            (folder / "ready").touch()
            time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1.0)  # a clean-up takes its time
        (folder / "cleaned").touch()
        return INTERRUPTED
    if word == "save-and-die":
        (folder / "checkpoints" / f"step-{turn:06d}").mkdir(parents=True)
    if word in ("die", "save-and-die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "vanish":  # as Ray's libraries do
        os._exit(1)
    if word == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if word == "litter":
        child = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
        code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print('x')"
        subprocess.run([sys.executable, "-c", code, child], check=True, stdout=subprocess.DEVNULL)
        return 0
    return int(word) if word.isdigit() else 0


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        sys.exit(watch(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]))
    sys.exit(drive(Path(sys.argv[1]), sys.argv[2:]))
