"""The life of training prompts, from admission to the cut of a batch: the queue's rules, without sockets.

Every step of a life is written to the ledger, which refuses what must not happen.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from caprl_async.config import Config
from caprl_async.replay.admission import capacity, may_caption
from caprl_async.replay.ledger import Event, Ledger, LedgerError
from caprl_async.replay.lives import (
    Cut,
    Life,
    Prepared,
    captions_to_judge,
    new_life,
    pop_due,
    reward_columns,
    score_group,
    spread,
    totals,
)
from caprl_async.replay.staleness import choose, group_fresh, token_staleness
from caprl_async.replay.tally import Measured, Tally
from caprl_async.replay.transport import encode
from caprl_async.replay.work import GenerateWork, JudgeWork, Verdicts, Work, judge_down, may_ask_again
from caprl_async.reward.allocation import Spreads
from caprl_async.types import (
    BatchReply,
    CaptionGroup,
    Evicted,
    Retried,
    ScoredGroup,
    TrainBatch,
    Version,
)

_BACKOFF_S = 0.25  # after a failure; doubled by each further one of the same prompt
_BACKOFF_MAX_S = 5.0


class TrainFlow:
    """Implements WorkOwner for training. `version` is the learner's; `is_open` lets prompts be leased."""

    def __init__(self, config: Config, ledger: Ledger, on_error: Callable[[str, str], None]) -> None:
        self._config = config
        self._replay = config.replay
        self._ledger = ledger
        self._on_error = on_error
        self.is_open = False
        self.finished = False
        self.cut_listener: Callable[[Cut], None] = lambda _: None
        self.captions_sampled = 0
        self.captions_trained = 0
        self.evicted: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.staleness: Counter[int] = Counter()  # tokens of all batches
        self._spreads = Spreads() if config.data.adaptive_questions else None
        self._reset(Version(0, 0), 0)

    def _reset(self, version: Version, cursor: int) -> None:
        self.version = version
        self.cursor = cursor  # index of the next prompt to admit
        self._base = version.step
        self._taken = 0
        self._judged = 0  # groups with an answer
        self._lives: dict[int, Life] = {}
        self._prepared: deque[Prepared] = deque()
        self._again: list[Life] = []  # to be captioned (again), before any new prompt
        self._to_judge: list[Life] = []
        self._ready: dict[int, ScoredGroup] = {}
        self._cut: Cut | None = None
        self._tally = Tally(self._replay)

    # ------------------------------------------------------------ admission

    @property
    def capacity(self) -> int:
        """New prompts that may be admitted now, to an engine that has the learner's weights."""
        return self._capacity(self.version)

    def _capacity(self, engine: Version) -> int:
        """New prompts for an engine with these weights, which may be older than the learner's."""
        return capacity(
            max_staleness=self._replay.max_staleness,
            steps=engine.step - self._base,
            batch_groups=self._replay.batch_groups,
            taken=self._taken,
            outstanding=self.outstanding,
        )

    @property
    def outstanding(self) -> int:
        """Prompts admitted and neither in a batch nor evicted."""
        return len(self._lives) - (len(self._cut.batch.groups) if self._cut else 0)

    @property
    def next_wanted(self) -> int:
        """Index of the next prompt that `offer` takes."""
        return self.cursor + len(self._prepared)

    @property
    def wants_prepared(self) -> bool:
        return len(self._prepared) < 2 * self._replay.batch_groups

    def offer(self, prepared: Prepared) -> None:
        """Takes the next row of the sampler; one that is not the next (after a restore) is passed over."""
        if prepared.index == self.next_wanted:
            self._prepared.append(prepared)

    def _admit(self, engine: Version) -> Life | None:
        while self._prepared and self._capacity(engine) >= 1:
            prepared = self._prepared.popleft()
            self.cursor = prepared.index + 1
            life = self._new_life(prepared, 0)
            self._record(life, Event.ADMITTED, self.version, row_id=prepared.row.row_id)
            if prepared.image is None:
                self._on_error(f"row {prepared.row.row_id}", prepared.error)
                self._evict(life, Evicted.BAD_ROW)
            elif not life.questions:
                self._evict(life, Evicted.NOT_ASKED)
            else:
                return life
        return None

    def _new_life(self, prepared: Prepared, attempt: int) -> Life:
        life = new_life(prepared, attempt, self._config, self._spreads)
        self._lives[prepared.index] = life
        return life

    # ------------------------------------------------------------ work (WorkOwner)

    def next_generate(self, peer: str, engine: Version | None, now: float) -> GenerateWork | None:
        if not self.is_open or self.finished:
            return None
        if engine is None or not may_caption(engine, self.version, self._replay.max_staleness):
            return None
        life = pop_due(self._again, now) or self._admit(engine)
        if life is None:
            return None
        self._record(life, Event.GENERATING, engine, peer=peer)
        return GenerateWork(self, life.prompt, engine)

    def next_judge(self, peer: str, serves: str, now: float) -> JudgeWork | None:
        if serves != "judge" or self.finished:
            return None
        while (life := pop_due(self._to_judge, now)) is not None:
            assert life.group is not None
            if not group_fresh(life.group, self.version, self._replay.max_staleness):
                self._retry(life, Retried.STALE)
                continue
            prompt, texts = life.prompt, captions_to_judge(life, self._config)
            return JudgeWork(self, prompt.key, prompt.attempt, texts, life.questions, prompt.index, "judge")
        return None

    def waiting_judges(self) -> set[str]:
        return {"judge"} if self._to_judge and not self.finished else set()

    def generated(self, work: GenerateWork, group: CaptionGroup, now: float) -> None:
        life = self._of(work.key, work.attempt)
        if life is None:
            return
        self.captions_sampled += len(group.captions)
        tokens = sum(len(caption.token_ids) for caption in group.captions)
        self._record(
            life,
            Event.JUDGING,
            group.oldest,
            peer=group.actor,
            started=group.started,
            finished=group.finished,
            tokens=tokens,
        )
        if not group_fresh(group, self.version, self._replay.max_staleness):
            self._retry(life, Retried.STALE)
            return
        life.group, life.not_before = group, 0.0
        self._ledger.journal(group.key, group.attempt, Event.JUDGING.value, encode(group))
        self._to_judge.append(life)

    def judged(self, work: JudgeWork, verdicts: Verdicts, now: float) -> None:
        life = self._of(work.key, work.attempt)
        if life is None or life.group is None:
            return
        if down := judge_down(verdicts):
            self._on_error(work.key, down.reason)
            if may_ask_again(life, self._judged, self._replay.max_attempts, own=not down.whole):
                life.not_before = now + 4 * _BACKOFF_S
                self._to_judge.append(life)
                return
        self._judged += 1
        judgement = score_group(life, verdicts, self._config)
        scored = judgement.scored
        self._tally.judged(judgement.missing, totals(scored) if scored is not None else [])
        if scored is None:
            self._evict(life, Evicted.UNSCORABLE)
            return
        if self._spreads is not None:
            self._spreads.learn(life.questions, scored.verdicts)
        if spread(scored.rewards, self._config) < self._replay.min_reward_spread:
            self._evict(life, Evicted.FILTERED)
            return
        self._ready[life.prompt.index] = scored
        self._record(life, Event.READY, self.version, **reward_columns(scored.rewards))
        self._ledger.journal(life.prompt.key, life.prompt.attempt, Event.READY.value, encode(scored))

    def failed(self, work: Work, reason: str, now: float, *, lost: bool = False) -> None:
        life = self._of(work.key, work.attempt)
        if life is None:
            return
        self._on_error(work.key, reason)
        self._tally.last_failure = reason
        wait = min(_BACKOFF_MAX_S, _BACKOFF_S * 2**life.failures)
        life.not_before = now if lost else now + wait
        if isinstance(work, JudgeWork):
            if may_ask_again(life, self._judged, self._replay.max_attempts):
                self._to_judge.append(life)
            else:
                self._evict(life, Evicted.FAILED)
            return
        life.failures += 1
        if life.failures < self._replay.max_attempts:
            self._retry(life, Retried.FAILED)
        else:
            self._evict(life, Evicted.FAILED)

    # ------------------------------------------------------------ batches

    def cut(self, version: Version, now: float) -> Cut | None:
        """The batch that leads from `version` on; None if it is not complete (or not the learner's version).

        Asked again for the same version it is the same batch.
        """
        if self._cut is not None and self._cut.batch.version == version:
            return self._cut
        if version != self.version or self._cut is not None:
            return None
        self._sweep()
        chosen = choose(self._ready.values(), self._replay.batch_groups, self._replay.max_staleness)
        if chosen is None:
            return None
        batch = TrainBatch(version=version, groups=chosen, cut=now)
        lives = [self._lives[scored.index] for scored in chosen]
        for life, scored in zip(lives, chosen, strict=True):
            del self._ready[scored.index]
            self._record(life, Event.CUT, version, oldest=str(scored.group.oldest))
        self._taken += len(chosen)
        self._cut = Cut(batch, encode(BatchReply(batch=batch)), tuple(life.questions for life in lives))
        self.staleness.update(token_staleness(batch.groups, batch.version))
        self._tally.cut(batch, self._cut.questions)
        self.cut_listener(self._cut)
        return self._cut

    def advance(self, version: Version) -> None:
        """The learner has reached `version`: the batch that led there is trained. Harmless if known.

        Raises:
            LedgerError: no batch led there.
        """
        if version <= self.version:
            return
        if self._cut is None or version != Version(self.version.epoch, self.version.step + 1):
            raise LedgerError(f"the learner reports version {version}, but it was at {self.version}")
        for scored in self._cut.batch.groups:
            self._record(self._lives[scored.index], Event.TRAINED, self._cut.batch.version)
            del self._lives[scored.index]
            self.captions_trained += len(scored.group.captions)
        self._ledger.forget(scored.group.key for scored in self._cut.batch.groups)
        self._cut = None
        self.version = version
        self._sweep()

    def _sweep(self) -> None:
        """Re-issues ready groups that are too old for the learner's next batch."""
        for index, scored in list(self._ready.items()):
            if not group_fresh(scored.group, self.version, self._replay.max_staleness):
                del self._ready[index]
                self._retry(self._lives[index], Retried.STALE)

    def measured(self, version: Version) -> Measured:
        """The batch cut at `version`, and what was filtered and retried since the one before.

        Raises:
            LedgerError: no such batch, or long ago.
        """
        return self._tally.measured(version)

    # ------------------------------------------------------------ the end of an attempt

    def _retry(self, life: Life, reason: Retried) -> None:
        prompt = life.prompt
        life.prompt = msgspec.structs.replace(prompt, attempt=prompt.attempt + 1)
        life.group = None
        if reason is Retried.STALE:
            life.not_before = 0.0
        self._record(life, Event.RETRIED, self.version, reason=reason.value)
        self._ledger.forget([prompt.key])
        self.retried[reason.value] += 1
        self._tally.retried(reason)
        self._again.append(life)
        self._again.sort(key=lambda waiting: waiting.prompt.index)

    def _evict(self, life: Life, reason: Evicted) -> None:
        self._record(life, Event.EVICTED, self.version, reason=reason.value)
        self._ledger.forget([life.prompt.key])
        self.evicted[reason.value] += 1
        del self._lives[life.prompt.index]
        self._tally.evicted(reason, ready=len(self._ready))

    def _record(self, life: Life, event: Event, version: Version, **detail: Any) -> None:
        prompt = life.prompt
        self._ledger.record(prompt.key, prompt.index, prompt.attempt, event, version, **detail)

    def _of(self, key: str, attempt: int) -> Life | None:
        """The live prompt of that attempt; None for an answer to what is no longer wanted."""
        life = self._lives.get(int(key.rpartition("/")[2]))
        return life if life is not None and life.prompt.attempt == attempt else None

    # ------------------------------------------------------------ checkpoints

    def depths(self) -> dict[str, int]:
        """How many prompts wait where."""
        return {
            "waiting_generate": len(self._again),
            "waiting_judge": len(self._to_judge),
            "ready": len(self._ready),
            "outstanding": self.outstanding,
        }

    def state(self) -> dict[str, Any]:
        """Plain data to go on from at the trained frontier: what is on its way is issued again."""
        self._ledger.commit()
        return {
            "cursor": self.cursor,
            "outstanding": sorted([i, life.prompt.attempt] for i, life in self._lives.items()),
            "captions_sampled": self.captions_sampled,
            "captions_trained": self.captions_trained,
            "staleness": sorted(self.staleness.items()),
            "spreads": self._spreads.state() if self._spreads is not None else [],
            "ledger": self._ledger.identity,
            "position": self._ledger.position,
        }

    def restore(self, state: dict[str, Any], version: Version, again: Sequence[Prepared]) -> None:
        """Goes back to `state`; `version` begins a new epoch; `again` are the outstanding rows, prepared.

        Raises:
            LedgerError: the ledger is this run's but does not hold what the state says.
        """
        self._reset(version, state["cursor"])
        self.captions_sampled = state["captions_sampled"]
        self.captions_trained = state["captions_trained"]
        self.staleness = Counter(dict(state["staleness"]))
        if self._spreads is not None:
            self._spreads = Spreads(state["spreads"])
        attempts = dict(state["outstanding"])
        own = state["ledger"] == self._ledger.identity
        self._ledger.roll_back(state["position"] if own else 0, version)
        if own and {i: attempt for i, (_, attempt) in self._ledger.lives.live.items()} != attempts:
            raise LedgerError(f"{self._ledger.path} and the checkpoint disagree on what was on its way")
        for prepared in sorted(again, key=lambda row: row.index):
            life = self._new_life(prepared, attempts[prepared.index])
            if not own:  # a checkpoint taken into another run folder
                self._record(life, Event.ADMITTED, version, row_id=prepared.row.row_id)
            self._retry(life, Retried.STALE)
            if prepared.image is None or not life.questions:
                self._again.remove(life)
                self._evict(life, Evicted.BAD_ROW if prepared.image is None else Evicted.NOT_ASKED)
