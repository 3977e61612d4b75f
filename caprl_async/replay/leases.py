"""Who is at the hub, what each was given to do, and who has fallen silent; no sockets, time is passed in.

A peer's capacity is learnt from its first Credit. From then on the hub counts what the peer holds: a lease
leaves the count when its answer comes, also if the hub has long given the work to another. So work in transit
is never given twice to the same slot.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from caprl_async.replay.work import GenerateWork, JudgeWork, Work
from caprl_async.types import Credit, Hello, Role, Version

_WINDOW_S = 20.0  # over which busy shares are measured


@dataclass
class PeerState:
    """One peer, as the hub knows it."""

    hello: Hello
    identity: bytes
    seen: float
    alive: bool = True
    slots: int = 0  # pieces of work it holds at most
    version: Version | None = None
    held: set[int] = field(default_factory=set)
    beats: deque[tuple[float, float, int, int]] = field(  # alive, busy, tokens, cached
        default_factory=lambda: deque(maxlen=256)  # also of a peer whose clock stands still
    )

    @property
    def available(self) -> int:
        """Pieces of work that it can be given now."""
        return self.slots - len(self.held) if self.alive else 0

    def credit(self, credit: Credit) -> None:
        """Takes in a heartbeat."""
        self.slots, self.version = credit.slots, credit.version
        self.beats.append((credit.alive_s, credit.busy_s, credit.tokens, credit.cached_tokens))
        while len(self.beats) > 2 and credit.alive_s - self.beats[0][0] > _WINDOW_S:
            self.beats.popleft()

    def busy_share(self) -> float | None:
        """Share of the last seconds in which its engine had work; None before two heartbeats."""
        if len(self.beats) < 2 or self.beats[-1][0] <= self.beats[0][0]:
            return None
        return (self.beats[-1][1] - self.beats[0][1]) / (self.beats[-1][0] - self.beats[0][0])


@dataclass(frozen=True)
class Held:
    """One lease: what, to whom, until when."""

    number: int
    peer: str
    work: Work
    deadline: float


class Leases:
    """All peers and all leases."""

    def __init__(self, lease_timeout_s: float, peer_timeout_s: float, first: int = 1) -> None:
        """`first` is the first lease's number; peers know lower ones from a hub that died."""
        self.peers: dict[str, PeerState] = {}  # by name
        self._by_identity: dict[bytes, PeerState] = {}
        self._leases: dict[int, Held] = {}
        self._lease_timeout_s = lease_timeout_s
        self._peer_timeout_s = peer_timeout_s
        self.first = first
        self._last = first - 1

    def hello(self, identity: bytes, hello: Hello, now: float) -> list[Held]:
        """A peer is here. If it is a new incarnation, what the older one held is returned as lost."""
        known = self.peers.get(hello.name)
        if known is not None and known.hello == hello and known.identity == identity:
            known.seen, known.alive = now, True
            return []
        lost: list[Held] = []
        if known is not None:
            lost = self._take(held for held in self._leases.values() if held.peer == hello.name)
            self._by_identity.pop(known.identity, None)
        state = PeerState(hello=hello, identity=identity, seen=now)
        self.peers[hello.name] = self._by_identity[identity] = state
        return lost

    def dismiss(self, name: str) -> list[Held]:
        """A peer has left for good; what it held."""
        peer = self.peers.pop(name, None)
        if peer is None:
            return []
        self._by_identity.pop(peer.identity, None)
        return self._take(held for held in self._leases.values() if held.peer == name)

    def heard(self, identity: bytes, now: float) -> PeerState | None:
        """The peer behind a message; None if it has not said Hello."""
        state = self._by_identity.get(identity)
        if state is not None:
            state.seen, state.alive = now, True
        return state

    def grant(self, peer: PeerState, work: Work, now: float) -> int:
        """Gives work to a peer; returns the lease's number."""
        self._last += 1
        self._leases[self._last] = Held(self._last, peer.hello.name, work, now + self._lease_timeout_s)
        peer.held.add(self._last)
        return self._last

    def knows(self, number: int) -> bool:
        """True for a lease that has been given and neither been answered nor taken back."""
        return number in self._leases

    def adopt(self, peer: PeerState, number: int, work: Work, now: float) -> None:
        """Takes over a lease that another hub gave to a peer."""
        self._leases[number] = Held(number, peer.hello.name, work, now + self._lease_timeout_s)
        peer.held.add(number)

    def answered(self, peer: PeerState, number: int) -> Held | None:
        """The lease that an answer is to; None if it is late, a duplicate, or another's."""
        peer.held.discard(number)
        held = self._leases.get(number)
        if held is None or held.peer != peer.hello.name:
            return None
        return self._leases.pop(number)

    def lost(self, now: float) -> list[tuple[Held, str]]:
        """Leases whose time is up or whose peer has fallen silent, with the reason; all are taken back."""
        for peer in self.peers.values():
            if peer.hello.role is not Role.LEARNER and now - peer.seen > self._peer_timeout_s:
                peer.alive = False
        silent = self._take(held for held in self._leases.values() if not self.peers[held.peer].alive)
        late = self._take(held for held in self._leases.values() if held.deadline <= now)
        return [
            *((held, f"{held.peer} has been silent for {self._peer_timeout_s:g} s") for held in silent),
            *((held, f"no answer from {held.peer} in {self._lease_timeout_s:g} s") for held in late),
        ]

    def revoke(self, unwanted: Callable[[Work], bool]) -> list[Held]:
        """Takes back all leases of unwanted work."""
        return self._take(held for held in self._leases.values() if unwanted(held.work))

    def givable(self) -> list[PeerState]:
        """Peers that can be given work now, the idlest first."""
        free = [peer for peer in self.peers.values() if peer.available > 0]
        return sorted(free, key=lambda peer: (-peer.available, peer.hello.name))

    def anyone(self, serves: str) -> bool:
        """True if a living judge answers these questions."""
        return any(peer.alive and peer.hello.serves == serves for peer in self.peers.values())

    def busy_shares(self) -> dict[str, float]:
        """Mean busy share of the living peers, by role (judges by what they serve)."""
        shares: dict[str, list[float]] = {}
        for peer in self.peers.values():
            share = peer.busy_share() if peer.alive else None
            if share is not None:
                shares.setdefault(peer.hello.serves or peer.hello.role.value, []).append(share)
        return {name: sum(values) / len(values) for name, values in shares.items()}

    def alive(self) -> dict[str, int]:
        """Number of living peers, by role (judges by what they serve)."""
        return dict(
            Counter(peer.hello.serves or peer.hello.role.value for peer in self.peers.values() if peer.alive)
        )

    def held_by_kind(self) -> dict[str, int]:
        """Number of leases, by kind of work."""
        works = [held.work for held in self._leases.values()]
        return {
            "generating": sum(isinstance(work, GenerateWork) for work in works),
            "judging": sum(isinstance(work, JudgeWork) for work in works),
        }

    def _take(self, chosen: Iterable[Held]) -> list[Held]:
        taken = list(chosen)
        for held in taken:
            del self._leases[held.number]
        return taken
