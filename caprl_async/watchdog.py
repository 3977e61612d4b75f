"""Watches the driver from a process of its own, and starts it again when it is killed, hangs or has lost Ray.

A driver cannot report its own SIGKILL. The watchdog imports neither Ray nor torch, so that little can happen
to it, and knows the driver by three things alone: its exit, a heartbeat through a pipe, and a last word.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from caprl_async import processes
from caprl_async.config import RingConfig

RESTART = os.EX_TEMPFAIL
"""Exit code of a driver that cannot go on itself, but whose successor can."""

INTERRUPTED = 130
"""Exit code of a run that was told to stop."""

BEAT_S = 1.0

_PIPE = "CAPRL_DRIVER_PIPE"  # tells a process that it is the driver; a file descriptor
_TICK_S = 0.2
_PATIENCE_S = 5.0  # for what a driver leaves behind; Ray's workers take 2 s when it was killed
_PAUSE_S = 5.0  # added before each further start without progress: a cluster may be under repair
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Heartbeat:
    """The driver's side: a sign of life each second, and a last word.

    Only an exit code that was said as a last word is the program's own: Ray's libraries end a process that
    has lost Ray with exit code 1, too.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        os.set_inheritable(pipe, False)  # what the driver starts must not hold it
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @classmethod
    def of_environment(cls) -> Heartbeat | None:
        """This process's heartbeat if a watchdog has started it, else None."""
        pipe = os.environ.pop(_PIPE, None)  # what the driver starts is no driver
        return None if pipe is None else cls(int(pipe))

    def last_word(self, code: int) -> None:
        """The program ends, as it meant to, with this exit code."""
        self._write(f"{code}\n")

    def _beat(self) -> None:
        while self._write("."):
            time.sleep(BEAT_S)
        os.kill(os.getpid(), signal.SIGTERM)  # the watchdog is gone, and nobody would start us again

    def _write(self, text: str) -> bool:
        try:
            os.write(self._pipe, text.encode())
        except BrokenPipeError:
            return False
        return True


def accept_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """From here on SIGINT and SIGTERM lead to `handler`; one that a driver's start held back does now."""
    for number in _SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@dataclass(frozen=True)
class _End:
    """How a driver ended."""

    code: int | None  # the run's; None: another driver can go on
    why: str = ""  # "the driver ..."; empty: it has said so itself


class Watchdog:
    """Runs `command(again)` until it ends by itself; `again` is false for the first start alone."""

    def __init__(self, ring: RingConfig, run_dir: Path, command: Callable[[bool], list[str]]) -> None:
        self._ring = ring
        self._run_dir = run_dir
        self._command = command
        self._spare = processes.descendants()  # a shell that has turned into us may have had children
        self._stop: int | None = None  # the signal that told us to

    def run(self) -> int:
        """The exit code of the run. Nothing that its drivers have started is left when this returns.

        SIGINT and SIGTERM are handed on to the driver, which ends the ring; a second one changes nothing.
        """
        processes.adopt_orphans()
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        restarts, again = 0, False
        while True:
            newest = self._newest()
            end = self._live(self._command(again))
            if end.why:
                _say(f"the driver {end.why}")
            left = processes.end_descendants(_PATIENCE_S, self._spare)
            if end.code is not None:
                if left:
                    _say("the run left processes behind, which have been ended: " + "; ".join(left))
                return end.code
            if self._newest() != newest:
                restarts = 0
            if restarts == self._ring.driver_restarts:
                _say(
                    f"error: no new checkpoint in {restarts} restarts (ring.driver_restarts); once the cause "
                    f"is gone, go on with: resume=true run_dir={self._run_dir}"
                )
                return 1
            restarts, again = restarts + 1, True
            self._pause(_PAUSE_S * (restarts - 1))
            if self._stop is not None:
                _say("stopped; everything this run started has been ended")
                return INTERRUPTED
            _say(
                f"starting the driver again, from {self._newest() or 'the beginning'} "
                f"(restart {restarts} of {self._ring.driver_restarts} without a new checkpoint)"
            )

    def _live(self, command: list[str]) -> _End:
        """One driver, from its start to its end."""
        child, pipe = _start(command)
        said, silent_s, hung, told = "", 0.0, False, False
        last = time.monotonic()
        while child.poll() is None:
            time.sleep(_TICK_S)
            processes.bury_orphans(child.pid)
            heard, now = _read(pipe), time.monotonic()
            said = (said + heard).lstrip(".")
            # A long tick means that we did not run ourselves: after Ctrl-Z the driver did not, either.
            silent_s = 0.0 if heard else silent_s + min(now - last, 2 * _TICK_S)
            last = now
            if self._stop is not None and not told:
                # Ctrl-C reaches the driver by itself, too; the second signal must find the first one handled.
                time.sleep(_TICK_S)
                child.send_signal(self._stop)
                told = True
            if silent_s > self._ring.hang_timeout_s and not hung:
                child.kill()  # ends a stopped process as well
                hung = True
        said += _read(pipe)
        os.close(pipe)
        return self._end(child.returncode, said.strip("."), hung)

    def _end(self, code: int, last_word: str, hung: bool) -> _End:
        if last_word:  # what comes after it, as a crash of a library that is being unloaded, is of no matter
            code = int(last_word)
            if code != RESTART:
                return _End(code)
            why = "cannot go on; a new one can"
        elif hung:
            why = f"gave no sign of life for {self._ring.hang_timeout_s:g} s (ring.hang_timeout_s); killed"
        elif code == -signal.SIGKILL:
            why = "was killed by SIGKILL; the kernel does so when memory runs out"
        elif code < 0:
            why = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        else:
            why = f"ended without a word, exit code {code}"
        return _End(None if self._stop is None else INTERRUPTED, why)

    def _newest(self) -> str:
        """The newest whole checkpoint, relative to the run folder; empty: none."""
        # Those of pre-training's stages lie in folders of theirs, whose names are in order too.
        every = [*self._run_dir.glob("checkpoints/step-*"), *self._run_dir.glob("*/checkpoints/step-*")]
        found = max(every, default=None)
        return str(found.relative_to(self._run_dir)) if found is not None else ""

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._stop is None and time.monotonic() < deadline:
            time.sleep(_TICK_S)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._stop = self._stop or signum


def _start(command: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """The driver and the end of the pipe on which its heartbeat is heard.

    It is born with the stop signals held back, so that none meets it before it can clean up.
    """
    heard, beats = os.pipe()
    os.set_blocking(heard, False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        child = subprocess.Popen(command, env={**os.environ, _PIPE: str(beats)}, pass_fds=[beats])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(beats)
    return child, heard


def _read(pipe: int) -> str:
    try:
        return os.read(pipe, 1 << 16).decode()
    except BlockingIOError:
        return ""


def _say(text: str) -> None:
    show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a killed progress bar leaves it hidden
    with contextlib.suppress(OSError):  # the terminal may be gone; the run goes on
        print(f"{show_cursor}{text}", file=sys.stderr, flush=True)
