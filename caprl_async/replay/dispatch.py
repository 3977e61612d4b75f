"""Takes peers' messages in and hands work out: the part of the hub between the socket and the flows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from caprl_async.config import ReplayConfig
from caprl_async.replay.breaker import Breaker
from caprl_async.replay.leases import Held, Leases, PeerState
from caprl_async.replay.transport import encode
from caprl_async.replay.work import (
    GenerateWork,
    JudgeWork,
    Work,
    WorkOwner,
    judge_down,
    wrong_group,
    wrong_verdicts,
)
from caprl_async.types import (
    Ack,
    Credit,
    Generated,
    GenerateLease,
    Hello,
    Holding,
    Judged,
    JudgeLease,
    PeerMessage,
    Revoke,
    Role,
)

_SMALL_EVAL = 32
"""Evaluation work that does not wait behind training; more of it takes turns with training."""

Outgoing = tuple[bytes, bytes]  # identity, encoded message


class Dispatch:
    """Leases work of several owners to peers; pure but for the owners. `outbox` is what is to be sent.

    Acknowledgements are kept back in `acks` until the ledger is durable.
    """

    def __init__(
        self,
        config: ReplayConfig,
        on_error: Callable[[str, str], None],
        first_lease: int = 1,
        judges: Sequence[str] = ("judge",),
    ) -> None:
        """`judges`: without whom training cannot go on."""
        self.leases = Leases(config.lease_timeout_s, config.peer_timeout_s, first_lease)
        self.outbox: deque[Outgoing] = deque()
        self.acks: list[Outgoing] = []
        self.unexpected = 0  # messages of peers that had not said Hello
        self.breakers: dict[str, Breaker] = {}  # by what judges serve
        self._config = config
        self._judges = judges
        self._on_error = on_error
        self._training_first = False
        self._orphans: dict[tuple[str, int], tuple[GenerateWork, float]] = {}  # with the time it is given up

    def take(self, identity: bytes, message: PeerMessage, now: float) -> None:
        """One message of a rollout or judge."""
        if isinstance(message, Hello):
            for lost in self.leases.hello(identity, message, now):
                self._lose(lost, f"{message.name} has started afresh", now)
            return
        peer = self.leases.heard(identity, now)
        if peer is None:
            self.unexpected += 1  # its next Hello is under way
        elif isinstance(message, Credit):
            for holding in message.holds:
                self._claimed(peer, holding, now)
            peer.credit(message)
        elif isinstance(message, Generated | Judged):
            if isinstance(message, Generated) and message.group is not None:
                self._claimed(peer, Holding(message.lease, message.group.key, message.group.attempt), now)
            self.acks.append((identity, encode(Ack(lease=message.lease))))
            held = self.leases.answered(peer, message.lease)
            if held is not None:
                self._answer(held.work, message, now)

    def dismiss(self, name: str, now: float) -> None:
        """A peer has left for good: others get what it held."""
        for held in self.leases.dismiss(name):
            self._lose(held, f"{name} has left", now)

    def inherit(self, works: Iterable[GenerateWork], now: float) -> None:
        """Work that a hub which died had leased, one does not know to whom: who holds it says so soon."""
        until = now + self._config.peer_timeout_s
        self._orphans = {(work.key, work.attempt): (work, until) for work in works}

    def _claimed(self, peer: PeerState, holding: Holding, now: float) -> None:
        if holding.lease >= self.leases.first or self.leases.knows(holding.lease):
            return
        work, _ = self._orphans.pop((holding.key, holding.attempt), (None, 0.0))
        if work is not None:
            self.leases.adopt(peer, holding.lease, work, now)
        else:  # nobody waits for it any more
            self.outbox.append((peer.identity, encode(Revoke(lease=holding.lease))))

    def _answer(self, work: Work, message: Generated | Judged, now: float) -> None:
        if message.failure is not None:
            self._fail(work, message.failure, now)
        elif isinstance(work, GenerateWork) and isinstance(message, Generated) and message.group:
            wrong = wrong_group(work.prompt, message.group)
            if wrong:
                self._fail(work, wrong, now)
            else:
                work.owner.generated(work, message.group, now)
        elif isinstance(work, JudgeWork) and isinstance(message, Judged) and message.verdicts is not None:
            wrong = wrong_verdicts(work, message.verdicts)
            if wrong:
                self._fail(work, wrong, now)
                return
            down = judge_down(message.verdicts)
            if down is not None and down.whole:
                self._breaker(work.serves).failed(work, down.reason, now)
            else:
                self._breaker(work.serves).answered(work)
            work.owner.judged(work, message.verdicts, now)
        else:
            self._fail(work, "an answer of the wrong kind or without content", now)

    def _fail(self, work: Work, reason: str, now: float, *, lost: bool = False) -> None:
        if isinstance(work, JudgeWork):
            self._breaker(work.serves).failed(work, reason, now)
        work.owner.failed(work, reason, now, lost=lost)

    def expire(self, waiting: Collection[str], needed: Collection[str], now: float) -> None:
        """Takes back what has waited too long or lies with a silent peer.

        Args:
            waiting: judges with work to do.
            needed: judges without which the run cannot go on.

        Raises:
            JudgesDown: judges have been silent for too long.
        """
        for held, why in self.leases.lost(now):
            self._revoke(held)
            self._lose(held, why, now)
        for name, (work, until) in list(self._orphans.items()):
            if until <= now:
                del self._orphans[name]
                work.owner.failed(work, "nobody holds it since the queue was restarted", now, lost=True)
        for serves in waiting:
            if not self.leases.anyone(serves):
                self._breaker(serves).nobody(now)
        for serves in needed:
            self._breaker(serves).check(now)

    def revoke(self, unwanted: Callable[[Work], bool]) -> None:
        """Takes back work that nobody wants any more; its owner hears nothing."""
        self._orphans = {name: held for name, held in self._orphans.items() if not unwanted(held[0])}
        for held in self.leases.revoke(unwanted):
            self._revoke(held)
            if isinstance(held.work, JudgeWork):
                self._breaker(held.work.serves).withdrawn(held.work)

    def _revoke(self, held: Held) -> None:
        peer = self.leases.peers[held.peer]
        self.outbox.append((peer.identity, encode(Revoke(lease=held.number))))

    def _lose(self, held: Held, why: str, now: float) -> None:
        self._fail(held.work, why, now, lost=True)

    def hand_out(self, evaluations: Iterable[tuple[WorkOwner, int]], training: WorkOwner, now: float) -> None:
        """Leases whatever peers can take now. `evaluations`: each with its amount of waiting work."""
        runs = list(evaluations)
        refused: set[str] = set()
        while True:
            givable = [peer for peer in self.leases.givable() if peer.hello.name not in refused]
            if not givable:
                return
            peer = givable[0]
            work = self._work_for(peer, runs, training, now)
            if work is None:
                refused.add(peer.hello.name)
                continue
            number = self.leases.grant(peer, work, now)
            self.outbox.append((peer.identity, encode(_message(number, work))))

    def _work_for(
        self, peer: PeerState, runs: list[tuple[WorkOwner, int]], training: WorkOwner, now: float
    ) -> Work | None:
        if peer.hello.role is Role.ROLLOUT and any(self._breaker(name).is_open for name in self._judges):
            return None  # no captions that nobody would score
        owners = [owner for owner, _ in runs]
        if sum(waiting for _, waiting in runs) > _SMALL_EVAL and self._training_first:
            owners = [training, *owners]
        else:
            owners = [*owners, training]
        self._training_first = not self._training_first
        for owner in owners:
            work: Work | None
            if peer.hello.role is Role.ROLLOUT:
                work = owner.next_generate(peer.hello.name, peer.version, now)
            elif peer.hello.role is Role.JUDGE:
                work = self._judge_work(owner, peer, now)
            else:
                return None
            if work is not None:
                return work
        if peer.hello.role is Role.JUDGE and not any(
            peer.hello.serves in owner.waiting_judges() for owner in owners
        ):
            self._breaker(peer.hello.serves).relent(now)
        return None

    def _judge_work(self, owner: WorkOwner, peer: PeerState, now: float) -> JudgeWork | None:
        breaker = self._breaker(peer.hello.serves)
        work = owner.next_judge(peer.hello.name, peer.hello.serves, now) if breaker.may_give(now) else None
        if work is not None:
            breaker.given(work)
        return work

    def _breaker(self, serves: str) -> Breaker:
        if serves not in self.breakers:
            self.breakers[serves] = Breaker(self._config, serves, self._on_error)
        return self.breakers[serves]


def _message(number: int, work: Work) -> Any:
    if isinstance(work, GenerateWork):
        return GenerateLease(lease=number, prompt=work.prompt)
    return JudgeLease(
        lease=number,
        key=work.key,
        attempt=work.attempt,
        captions=work.captions,
        questions=work.questions,
        rotation=work.rotation,
        image=work.image,
    )
