"""What happens between two batches: the step's metrics, and when to give up filling one."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from caprl_async.config import ReplayConfig
from caprl_async.judge.monitors import Missing, hacking_metrics, missing_metrics
from caprl_async.replay.events import LedgerError
from caprl_async.replay.metrics import batch_metrics, mean
from caprl_async.types import Evicted, Question, Retried, TrainBatch, Version

_KEPT = 2  # batches whose metrics can be asked for
_MISSING = 512  # groups over which missing verdicts are related to length and reward
_READ = 256  # captions of a batch in which signs of reward hacking are looked for
_REMEDIES = {
    Evicted.FILTERED: "all captions of a group got equal rewards: can this judge answer in this judge.mode?",
    Evicted.UNSCORABLE: "the judge could not score them: look at judge.*, reward.* and the questions",
    Evicted.FAILED: "they failed too often",
    Evicted.NOT_ASKED: "all their questions are about absent things, and reward.absent is 0",
    Evicted.BAD_ROW: "their images cannot be read: look at data.train and data.image_dir",
}


class NothingToTrain(RuntimeError):
    """Group after group is evicted; no batch will be full."""


@dataclass(frozen=True)
class Measured:
    """One batch: what was counted when it was cut, and what more there is to read in it."""

    numbers: dict[str, float]
    batch: TrainBatch
    questions: Sequence[Sequence[Question]]  # of each group

    def metrics(self) -> dict[str, float]:
        """Everything measured; reads some of the captions, which takes up to half a second."""
        some = -(-_READ // max(1, len(self.batch.groups[0].group.captions))) if self.batch.groups else 0
        return {**self.numbers, **hacking_metrics(self.batch.groups[:some], self.questions[:some])}


class Tally:
    """Counts of one epoch."""

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._evicted: Counter[Evicted] = Counter()
        self._retried: Counter[Retried] = Counter()
        self._rewards: list[float] = []
        self._missing: deque[tuple[Missing, ...]] = deque(maxlen=_MISSING)
        self._accuracies: defaultdict[str, list[float]] = defaultdict(list)  # by judge model
        self._metrics: dict[Version, Measured] = {}
        self.last_failure = ""

    def judged(self, missing: tuple[Missing, ...], rewards: Sequence[float], judge: str = "judge") -> None:
        """Verdicts on a group have come, from one of the judge models."""
        self._missing.append(missing)
        self._accuracies[judge] += [one.accuracy for one in missing if one.accuracy is not None]
        self._rewards.extend(rewards)

    def retried(self, reason: Retried) -> None:
        self._retried[reason] += 1

    def evicted(self, reason: Evicted, ready: int) -> None:
        """One group more is lost; `ready` groups wait for the batch.

        Raises:
            NothingToTrain: too many since the last batch (replay.max_evicted_batches).
        """
        self._evicted[reason] += 1
        limit = self._config.max_evicted_batches
        if sum(self._evicted.values()) <= limit * self._config.batch_groups:
            return
        most, _ = self._evicted.most_common(1)[0]
        found = ", ".join(f"{count} {why.value}" for why, count in self._evicted.items())
        last = f"; the last failure was: {self.last_failure}" if self._evicted[Evicted.FAILED] else ""
        raise NothingToTrain(
            f"since the last batch {found} groups were evicted and {ready} are ready, mean reward "
            f"{mean(self._rewards):.3f}; {_REMEDIES[most]}{last} "
            f"(limit: replay.max_evicted_batches={limit:g})"
        )

    def cut(self, batch: TrainBatch, questions: Sequence[Sequence[Question]]) -> None:
        """Measures a batch and begins to count afresh; `questions` of each group."""
        numbers = {
            **batch_metrics(batch.groups, batch.version, self._config.max_staleness),
            **missing_metrics(self._missing),
            "reward_all_mean": mean(self._rewards),
            "accuracy_all_mean": mean(itertools.chain.from_iterable(self._accuracies.values())),
            **self._by_judge(),
            "zero_variance_groups": float(self._evicted[Evicted.FILTERED]),
            "unscorable_groups": float(self._evicted[Evicted.UNSCORABLE]),
            "failed_groups": float(self._evicted[Evicted.FAILED]),
            "stale_retries": float(self._retried[Retried.STALE]),
            "failed_retries": float(self._retried[Retried.FAILED]),
        }
        self._metrics[batch.version] = Measured(numbers, batch, questions)
        self._evicted, self._retried, self._rewards = Counter(), Counter(), []
        self._accuracies.clear()
        for old in sorted(self._metrics)[:-_KEPT]:
            del self._metrics[old]

    def _by_judge(self) -> dict[str, float]:
        """Where several judge models take turns: what each finds."""
        if len(self._accuracies) < 2:
            return {}
        return {f"accuracy_{name}": mean(found) for name, found in self._accuracies.items()}

    def has_measured(self, version: Version) -> bool:
        """Whether `measured` knows this batch."""
        return version in self._metrics

    def measured(self, version: Version) -> Measured:
        """The batch cut at `version`, and what came between it and the one before.

        Raises:
            LedgerError: no such batch, or long ago.
        """
        if version not in self._metrics:
            raise LedgerError(f"no batch was cut at version {version}")
        return self._metrics[version]
