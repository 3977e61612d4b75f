"""Holds work back from judges that do not answer: a circuit breaker with a budget; time is passed in.

Closed, work flows. Open, nothing new is captioned, and one piece of work at a time tries whether the judges
are back. A judge's failure never becomes a reward: the work is only asked again.
"""

from __future__ import annotations

from collections.abc import Callable

from caprl_async.config import ReplayConfig
from caprl_async.replay.work import JudgeWork

_PAUSE_S, _PAUSE_MAX_S = 0.5, 10.0  # before a trial; doubled by each trial that fails


class JudgesDown(RuntimeError):
    """No judge has answered for as long as the run may wait."""


class Breaker:
    """Of the judges that answer one set of questions (`serves`)."""

    def __init__(self, config: ReplayConfig, serves: str, on_turn: Callable[[str, str], None]) -> None:
        """`on_turn(source, text)` hears when it opens, and when judges answer again."""
        self._config = config
        self._serves = serves
        self._on_turn = on_turn
        self._in_a_row = 0
        self._since: float | None = None  # the first of them
        self._last = -1.0  # the last failure; those of one moment (a peer died) are one
        self._opened: float | None = None
        self._spent_s = 0.0  # open before that, since the last answer
        self._next_trial = 0.0
        self._pause_s = _PAUSE_S
        self._trial: JudgeWork | None = None
        self.reason = ""
        self.outages = 0

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    def may_give(self, now: float) -> bool:
        """True if a judge may be given work now."""
        return not self.is_open or (self._trial is None and now >= self._next_trial)

    def given(self, work: JudgeWork) -> None:
        """A judge was given work; `answered`, `failed` or `withdrawn` follows."""
        if self.is_open:
            self._trial = work

    def withdrawn(self, work: JudgeWork) -> None:
        """Nobody wants the answer any more."""
        self._is_trial(work)

    def relent(self, now: float) -> None:
        """Nothing is left to try the judges with: work flows again, and one failure opens it once more."""
        if self._opened is not None and self.may_give(now):
            self._spent_s += now - self._opened
            self._opened, self._since = None, None
            self._in_a_row = self._config.judge_failures - 1

    def answered(self, work: JudgeWork) -> None:
        """A judge has answered."""
        self._is_trial(work)
        if self.is_open or self._spent_s:
            self._on_turn("judge", f"{self._serves}: judges answer again")
        self._opened, self._since = None, None
        self._in_a_row, self._spent_s, self._pause_s = 0, 0.0, _PAUSE_S

    def failed(self, work: JudgeWork, reason: str, now: float) -> None:
        """A judge failed, died, was too late, or said that it is down."""
        trial = self._is_trial(work)
        self.reason = reason
        if self.is_open:
            if trial:
                self._pause_s = min(_PAUSE_MAX_S, 2 * self._pause_s)
                self._next_trial = now + self._pause_s
            return
        if now != self._last:
            self._since = now if self._since is None else self._since
            self._in_a_row, self._last = self._in_a_row + 1, now
        if self._in_a_row >= self._config.judge_failures:
            since = now if self._since is None else self._since
            self._open(f"{self._in_a_row} failures in a row, the last: {reason}", since)
            self._next_trial = now + self._pause_s

    def nobody(self, now: float) -> None:
        """Work waits, and no judge is alive."""
        if not self.is_open:
            self.reason = "no judge is alive"
            self._open(self.reason, now)

    def check(self, now: float) -> None:
        """
        Raises:
            JudgesDown: there has been no answer for `replay.judge_outage_s`.
        """
        outage_s = self._spent_s + (now - self._opened if self._opened is not None else 0.0)
        if outage_s > self._config.judge_outage_s:
            raise JudgesDown(
                f"the judges ({self._serves}) have not answered for {outage_s:.0f} s: {self.reason}. Mend "
                "that and go on with resume=true, or allow more by replay.judge_outage_s (now "
                f"{self._config.judge_outage_s:g})"
            )

    def _is_trial(self, work: JudgeWork) -> bool:
        trial = work is self._trial
        self._trial = None if trial else self._trial
        return trial

    def _open(self, why: str, since: float) -> None:
        self.outages += not self._spent_s
        self._opened = since
        self._on_turn("judge", f"{self._serves}: judges do not answer ({why}); their work waits")
