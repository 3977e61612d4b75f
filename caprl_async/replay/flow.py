"""The life of training prompts, from admission to the cut of a batch: the queue's rules, without sockets.

Every step of a life is written to the ledger, which refuses what must not happen.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from caprl_async.config import Config
from caprl_async.judge.panel import panel
from caprl_async.replay.admission import capacity, may_caption
from caprl_async.replay.events import Event, LedgerError
from caprl_async.replay.ledger import Judged, Ledger
from caprl_async.replay.lives import (
    Cut,
    Life,
    Prepared,
    captions_to_judge,
    new_life,
    pop_due,
    score_group,
    spread,
    totals,
)
from caprl_async.replay.queue import Kept, Queue, make_cut
from caprl_async.replay.staleness import choose, group_fresh, token_staleness
from caprl_async.replay.tally import Measured, Tally
from caprl_async.replay.transport import encode
from caprl_async.replay.work import (
    GenerateWork,
    JudgeWork,
    Verdicts,
    Work,
    judge_down,
    may_ask_again,
    shown_to,
)
from caprl_async.reward.allocation import Spreads
from caprl_async.types import CaptionGroup, Evicted, Retried, TrainBatch, Version

_BACKOFF_S = 0.25  # after a failure; doubled by each further one of the same prompt
_BACKOFF_MAX_S = 5.0


class TrainFlow:
    """Implements WorkOwner for training. `version` is the learner's; `is_open` lets prompts be leased."""

    def __init__(self, config: Config, ledger: Ledger, on_error: Callable[[str, str], None]) -> None:
        self.config = config
        self._replay = config.replay
        self._judges = panel(config.judge)
        self.ledger = ledger
        self._on_error = on_error
        self.is_open = False
        self.finished = False
        self.cut_listener: Callable[[Cut], None] = lambda _: None
        self.captions_sampled = 0
        self.captions_trained = 0
        self.evicted: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.staleness: Counter[int] = Counter()  # tokens of all batches
        self.spreads = Spreads() if config.data.adaptive_questions else None
        self.reset(Queue(Version(0, 0)))

    def reset(self, queue: Queue) -> None:
        self.queue = queue
        self._judged = 0  # groups with an answer
        self._prepared: deque[Prepared] = deque()
        self.tally = Tally(self._replay)

    @property
    def version(self) -> Version:
        """The learner's."""
        return self.queue.version

    @property
    def bases(self) -> Mapping[int, int]:
        """See `staleness.Bases`."""
        return self.queue.bases

    # ------------------------------------------------------------ admission

    @property
    def capacity(self) -> int:
        """New prompts that may be admitted now, to an engine that has the learner's weights."""
        return self._capacity(self.version)

    def _capacity(self, engine: Version) -> int:
        """New prompts for an engine with these weights, which may be older than the learner's."""
        return capacity(
            max_staleness=self._replay.max_staleness,
            steps=engine.step - self.queue.base,
            batch_groups=self._replay.batch_groups,
            taken=self.queue.taken,
            outstanding=self.queue.outstanding,
        )

    @property
    def next_wanted(self) -> int:
        """Index of the next prompt that `offer` takes."""
        return self.queue.cursor + len(self._prepared)

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
            self.queue.cursor = prepared.index + 1
            life = self.new_life(prepared, 0)
            self.admitted(life)
            if prepared.image is None:
                self._on_error(f"row/{prepared.row.row_id}", prepared.error)
                self.evict(life, Evicted.BAD_ROW)
            elif not life.questions:
                self.evict(life, Evicted.NOT_ASKED)
            else:
                return life
        return None

    def new_life(self, prepared: Prepared, attempt: int) -> Life:
        life = new_life(prepared, attempt, self.config, self.spreads)
        self.queue.lives[prepared.index] = life
        return life

    def admitted(self, life: Life) -> None:
        prompt = life.prompt
        shown = prompt.image.pictures[0].sha256
        self._record(life, Event.ADMITTED, self.version, row_id=prompt.row_id, image=shown)

    # ------------------------------------------------------------ work (WorkOwner)

    def next_generate(self, peer: str, engine: Version | None, now: float) -> GenerateWork | None:
        if not self.is_open or self.finished:
            return None
        if engine is None or not may_caption(engine, self.version, self._replay.max_staleness, self.bases):
            return None
        life = pop_due(self.queue.again, now) or self._admit(engine)
        if life is None:
            return None
        self._record(life, Event.GENERATING, engine, peer=peer)
        return GenerateWork(self, life.prompt, engine)

    def next_judge(self, peer: str, serves: str, now: float) -> JudgeWork | None:
        if serves not in self._judges or self.finished:
            return None

        def theirs(life: Life) -> bool:
            return self._asks(life) == serves

        while (life := pop_due(self.queue.to_judge, now, theirs)) is not None:
            assert life.group is not None
            if not self.fresh(life.group):
                self.retry(life, Retried.STALE)
                continue
            prompt, texts = life.prompt, captions_to_judge(life, self.config)
            seen = shown_to(self.config, serves, prompt.image)
            # One further for each prompt that this judge is asked about, also where several take turns.
            rotation = prompt.index // len(self._judges)
            return JudgeWork(
                self, prompt.key, prompt.attempt, texts, life.questions, rotation, serves, peer, seen
            )
        return None

    def waiting_judges(self) -> set[str]:
        return set() if self.finished else {self._asks(life) for life in self.queue.to_judge}

    def _asks(self, life: Life) -> str:
        """Which judges its captions are for."""
        return self._judges[life.prompt.index % len(self._judges)]

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
        if not self.fresh(group):
            self.retry(life, Retried.STALE)
            return
        life.group, life.not_before = group, 0.0
        self.ledger.journal(group.key, group.attempt, Event.JUDGING.value, encode(Kept.of(life)))
        self.queue.to_judge.append(life)

    def fresh(self, group: CaptionGroup) -> bool:
        return group_fresh(group, self.version, self._replay.max_staleness, self.bases)

    def judged(self, work: JudgeWork, verdicts: Verdicts, now: float) -> None:
        life = self._of(work.key, work.attempt)
        if life is None or life.group is None:
            return
        if down := judge_down(verdicts):
            self._on_error(work.key, down.reason)
            if may_ask_again(life, self._judged, self._replay.max_attempts, own=not down.whole):
                life.not_before = now + 4 * _BACKOFF_S
                self.queue.to_judge.append(life)
                return
        self._judged += 1
        judgement = score_group(life, verdicts, self.config)
        scored = judgement.scored
        rewards = totals(scored) if scored is not None else []
        self.tally.judged(judgement.missing, rewards, work.serves)
        if scored is None:
            seq = self.evict(life, Evicted.UNSCORABLE)
        else:
            if self.spreads is not None:
                self.ledger.keep_spreads(self.spreads.learn(life.questions, scored.verdicts))
            if spread(scored.rewards, self.config) < self._replay.min_reward_spread:
                seq = self.evict(life, Evicted.FILTERED)
            else:
                seq = self._record(life, Event.READY, self.version)
                self.queue.ready[life.prompt.index] = scored
                kept = encode(Kept.of(life, scored))
                self.ledger.journal(life.prompt.key, life.prompt.attempt, Event.READY.value, kept)
        captions, parts = life.group.captions, judgement.parts
        self.ledger.record_judged(
            seq, Judged(work.peer, work.rotation, life.questions, captions, parts, verdicts)
        )

    def failed(self, work: Work, reason: str, now: float, *, lost: bool = False) -> None:
        life = self._of(work.key, work.attempt)
        if life is None:
            return
        self._on_error(work.key, reason)
        self.tally.last_failure = reason
        wait = min(_BACKOFF_MAX_S, _BACKOFF_S * 2**life.failures)
        life.not_before = now if lost else now + wait
        if isinstance(work, JudgeWork):
            if may_ask_again(life, self._judged, self._replay.max_attempts):
                self.queue.to_judge.append(life)
            else:
                self.evict(life, Evicted.FAILED)
            return
        life.failures += 1
        if life.failures < self._replay.max_attempts:
            self.retry(life, Retried.FAILED)
        else:
            self.evict(life, Evicted.FAILED)

    # ------------------------------------------------------------ batches

    def cut(self, version: Version, now: float) -> Cut | None:
        """The batch that leads from `version` on; None if it is not complete (or not the learner's version).

        Asked again for the same version it is the same batch.
        """
        queue = self.queue
        if queue.cut is not None and queue.cut.batch.version == version:
            return queue.cut
        if version != queue.version or queue.cut is not None:
            return None
        self._sweep()
        chosen = choose(queue.ready.values(), self._replay.batch_groups, self._replay.max_staleness)
        if chosen is None:
            return None
        batch = TrainBatch(version=version, groups=chosen, cut=now)
        for scored in chosen:
            del queue.ready[scored.index]
            oldest = str(scored.group.oldest)
            self._record(queue.lives[scored.index], Event.CUT, version, oldest=oldest, at=now)
        queue.taken += len(chosen)
        queue.cut = make_cut(batch, queue.lives)
        self.staleness.update(token_staleness(batch.groups, batch.version))
        self.tally.cut(batch, queue.cut.questions)
        self.cut_listener(queue.cut)
        return queue.cut

    def advance(self, version: Version, advantages: Sequence[Sequence[float]] = ()) -> None:
        """The learner has reached `version`: the batch that led there is trained. Harmless if known.

        Args:
            advantages: [group][caption], of the captions that were trained on, where they are known.

        Raises:
            LedgerError: no batch led there.
        """
        queue = self.queue
        if version <= queue.version:
            return
        if queue.cut is None or version != Version(queue.version.epoch, queue.version.step + 1):
            raise LedgerError(f"the learner reports version {version}, but it was at {queue.version}")
        batch = queue.cut.batch
        for scored, known in zip(batch.groups, advantages or ((),) * len(batch.groups), strict=True):
            life = queue.lives.pop(scored.index)
            self._record(life, Event.TRAINED, batch.version, advantages=[round(a, 6) for a in known])
            self.captions_trained += len(scored.group.captions)
        self.ledger.forget(scored.group.key for scored in batch.groups)
        queue.cut, queue.version = None, version
        self._sweep()

    def _sweep(self) -> None:
        """Re-issues ready groups that are too old for the learner's next batch."""
        queue = self.queue
        for index, scored in list(queue.ready.items()):
            if not self.fresh(scored.group):
                del queue.ready[index]
                self.retry(queue.lives[index], Retried.STALE)

    def has_measured(self, version: Version) -> bool:
        """Whether `measured` knows this batch."""
        return self.tally.has_measured(version)

    def measured(self, version: Version) -> Measured:
        """The batch cut at `version`, and what was filtered and retried since the one before.

        Raises:
            LedgerError: no such batch, or long ago.
        """
        return self.tally.measured(version)

    # ------------------------------------------------------------ the end of an attempt

    def retry(self, life: Life, reason: Retried) -> None:
        prompt = life.prompt
        life.prompt = msgspec.structs.replace(prompt, attempt=prompt.attempt + 1)
        life.group = None
        if reason is Retried.STALE:
            life.not_before = 0.0
        self._record(life, Event.RETRIED, self.version, reason=reason.value)
        self.ledger.forget([prompt.key])
        self.retried[reason.value] += 1
        self.tally.retried(reason)
        self.queue.again.append(life)
        self.queue.again.sort(key=lambda waiting: waiting.prompt.index)

    def evict(self, life: Life, reason: Evicted) -> int:
        seq = self._record(life, Event.EVICTED, self.version, reason=reason.value)
        self.ledger.forget([life.prompt.key])
        self.evicted[reason.value] += 1
        del self.queue.lives[life.prompt.index]
        self.tally.evicted(reason, ready=len(self.queue.ready))
        return seq

    def _record(self, life: Life, event: Event, version: Version, **detail: Any) -> int:
        prompt = life.prompt
        return self.ledger.record(prompt.key, prompt.index, prompt.attempt, event, version, **detail)

    def _of(self, key: str, attempt: int) -> Life | None:
        """The live prompt of that attempt; None for an answer to what is no longer wanted."""
        life = self.queue.lives.get(int(key.rpartition("/")[2]))
        return life if life is not None and life.prompt.attempt == attempt else None

    # ------------------------------------------------------------ checkpoints and crashes

    def depths(self) -> dict[str, int]:
        """How many prompts wait where."""
        return {
            "waiting_generate": len(self.queue.again),
            "waiting_judge": len(self.queue.to_judge),
            "ready": len(self.queue.ready),
            "outstanding": self.queue.outstanding,
        }
