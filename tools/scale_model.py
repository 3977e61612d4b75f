"""The ring as a discrete-event simulation (simpy): engines, judges, queue, learners, weight syncs, deaths.

What it takes from the real ring: work is leased to whoever has a lane free; a group is admitted only if, by
its place in the order, it would be trained at most max_staleness versions after the one that its engine has;
a batch is cut from what is ready, oldest first, and what is too old is captioned again; the learner goes on
while weights travel, and only the newest weights are sent; an engine stands still while it receives; the
queue is one process that takes a little time for each message.
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

Events = Generator[simpy.Event, Any, None]


class Broadcast(enum.Enum):
    """How weights get to the engines."""

    flat = "flat"  # from the learner to one engine after the other
    tree = "tree"  # everybody who has them passes them on to two
    pipelined = "pipelined"  # in pieces along a chain: everybody receives at one time


@dataclass(frozen=True)
class Loads:
    """What one GPU, or one process, is busy for; seconds. Groups are those of one image."""

    group: float  # an engine's lane, per group: all captions of it, the longest included
    judge: float  # a judge's lane, per group
    train: float  # a learner's GPU, per group
    weights: float  # one transfer of all weights over one link
    lanes: int = 8  # groups that an engine works on at one time
    judge_lanes: int = 8
    group_sigma: float = 0.3  # of the logarithm of a group's time
    judge_sigma: float = 0.3
    train_sigma: float = 0.05
    snapshot: float = 0.0  # the learner's copy of its weights
    all_reduce: float = (
        0.0  # gradients of all weights over one link; a ring of n ranks takes 2 (n - 1) / n of it
    )
    message: float = 0.0  # the queue's time for one group's message
    engine_sigma: float = 0.0  # GPUs are not alike: of the logarithm of an engine's speed
    mtbf: float = math.inf  # of an engine
    restart: float = 0.0

    @property
    def gpu_seconds(self) -> float:
        """Of all roles, per group."""
        return self.group / self.lanes + self.judge / self.judge_lanes + self.train


@dataclass(frozen=True)
class Design:
    """Who is there, and the rules."""

    engines: int
    judges: int
    ranks: int
    batch: int  # groups
    max_staleness: int = 2
    broadcast: Broadcast = Broadcast.pipelined
    in_flight: bool = True  # else an engine ends what it has begun before it takes new weights
    queues: int = 1  # processes among which the queue's messages are divided

    @property
    def gpus(self) -> int:
        return self.engines + self.judges + self.ranks


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to, the first batches left out."""

    groups_per_s: float
    efficiency: float  # GPU-seconds of useful work over those that there were
    idle: dict[str, float]  # share of a role's time
    staleness: float  # mean, in batches
    wasted: float  # share of the groups that were captioned in vain: stale or lost with an engine
    sync_s: float  # of one transfer to all engines


def luck(sigma: float, draws: random.Random) -> float:
    """A factor of mean 1, log-normal."""
    return draws.lognormvariate(-sigma * sigma / 2, sigma)


@dataclass
class _Group:
    version: int  # of the engine when it began
    finished: float = 0.0


class _Engine:
    """Lanes that stand still together, and die together."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.version = 0
        self.held = 0.0  # seconds of all standstills so far
        self.until = 0.0  # when the last one ends
        self.deaths = 0
        self.news: simpy.Event | None = None  # that lanes without admission wait for
        self.busy = 0.0  # lane-seconds of work that counted

    def hold(self, now: float, seconds: float) -> None:
        self.until = max(now, self.until) + seconds
        self.held += seconds


class Simulation:
    """One ring."""

    def __init__(self, loads: Loads, design: Design, seed: int = 0) -> None:
        self.loads, self.design = loads, design
        self.env = simpy.Environment()
        self.draws = random.Random(seed)
        self.admitted = 0  # groups so far, but for those that came to nothing
        self.to_judge: simpy.Store = simpy.Store(self.env)
        self.ready: deque[_Group] = deque()
        self.arrived = self.env.event()
        self.hubs = [simpy.Resource(self.env) for _ in range(design.queues)]
        self.engines = [_Engine(luck(loads.engine_sigma, self.draws)) for _ in range(design.engines)]
        self.version = 0
        self.sending = False
        self.trained: list[float] = []  # when each batch was
        self.ages: list[float] = []
        self.syncs: list[float] = []
        self.vain = 0
        self.judged = 0.0  # lane-seconds
        self.learnt = 0.0  # seconds of the whole group of ranks
        for engine in self.engines:
            for _ in range(loads.lanes):
                self.env.process(self._lane(engine))
            if math.isfinite(loads.mtbf):
                self.env.process(self._deaths(engine))
        for _ in range(design.judges * loads.judge_lanes):
            self.env.process(self._judge_lane())
        self.env.process(self._learner())

    def run(self, batches: int, leave_out: int) -> Outcome:
        """Until so many batches are trained; the first are left out of all figures."""
        marks: dict[str, float] = {}
        while len(self.trained) < batches:
            self.env.step()
            if not marks and len(self.trained) == leave_out:
                marks = {"time": self.env.now, **self._work(), "vain": self.vain, "ages": len(self.ages)}
        seconds = self.env.now - marks["time"]
        done = {name: value - marks[name] for name, value in self._work().items()}
        design, loads = self.design, self.loads
        groups = (batches - leave_out) * design.batch
        ages = self.ages[int(marks["ages"]) :]
        return Outcome(
            groups_per_s=groups / seconds,
            efficiency=groups / seconds * loads.gpu_seconds / design.gpus,
            idle={
                "rollout": 1 - done["rollout"] / (seconds * design.engines * loads.lanes),
                "judge": 1 - done["judge"] / (seconds * design.judges * loads.judge_lanes),
                "learner": 1 - done["learner"] / seconds,
            },
            staleness=sum(ages) / max(1, len(ages)),
            wasted=(self.vain - marks["vain"]) / max(1.0, groups + self.vain - marks["vain"]),
            sync_s=sum(self.syncs) / max(1, len(self.syncs)),
        )

    def _work(self) -> dict[str, float]:
        return {
            "rollout": sum(engine.busy for engine in self.engines),
            "judge": self.judged,
            "learner": self.learnt,
        }

    # ------------------------------------------------------------ processes

    def _lane(self, engine: _Engine) -> Events:
        loads = self.loads
        while True:
            while self.admitted // self.design.batch - engine.version > self.design.max_staleness:
                engine.news = engine.news or self.env.event()
                yield engine.news
            self.admitted += 1
            yield from self._message()
            while self.env.now < engine.until:
                yield self.env.timeout(engine.until - self.env.now)
            group = _Group(engine.version)
            deaths, work = engine.deaths, loads.group / engine.speed * luck(loads.group_sigma, self.draws)
            left, held = work, engine.held
            while left > 0:
                yield self.env.timeout(left)
                left, held = engine.held - held, engine.held
            if engine.deaths > deaths:  # what it had is lost and leased again
                self._in_vain(1)
                continue
            engine.busy += work
            yield from self._message()
            yield self.to_judge.put(group)

    def _judge_lane(self) -> Events:
        loads = self.loads
        while True:
            group = yield self.to_judge.get()
            work = loads.judge * luck(loads.judge_sigma, self.draws)
            yield self.env.timeout(work)
            self.judged += work
            yield from self._message()
            self.ready.append(group)
            if not self.arrived.triggered:
                self.arrived.succeed()

    def _learner(self) -> Events:
        loads, design = self.loads, self.design
        while True:
            batch = self._cut()
            while batch is None:
                self.arrived = self.env.event()
                yield self.arrived
                batch = self._cut()
            yield from self._message()
            ring = 2 * (design.ranks - 1) / design.ranks * loads.all_reduce
            seconds = loads.train * design.batch / design.ranks * luck(loads.train_sigma, self.draws)
            yield self.env.timeout(seconds + ring)
            self.learnt += seconds
            self.ages += [float(self.version - group.version) for group in batch]
            self.version += 1
            self.trained.append(self.env.now)
            yield self.env.timeout(loads.snapshot)
            if not self.sending:
                self.sending = True
                self.env.process(self._send())

    def _cut(self) -> list[_Group] | None:
        """A batch of the oldest that are not too old; these are captioned again."""
        oldest = self.version - self.design.max_staleness
        stale = [group for group in self.ready if group.version < oldest]
        if stale:
            self.ready = deque(group for group in self.ready if group.version >= oldest)
            self._in_vain(len(stale))
        if len(self.ready) < self.design.batch:
            return None
        chosen = sorted(self.ready, key=lambda group: group.version)[: self.design.batch]
        taken = {id(group) for group in chosen}
        self.ready = deque(group for group in self.ready if id(group) not in taken)
        return chosen

    def _in_vain(self, groups: int) -> None:
        """They leave, and others may be admitted in their place."""
        self.vain += groups
        self.admitted -= groups
        for engine in self.engines:
            self._tell(engine)

    def _tell(self, engine: _Engine) -> None:
        if engine.news is not None:
            engine.news.succeed()
            engine.news = None

    def _send(self) -> Events:
        """The newest weights to every engine, as often as there are newer ones."""
        sent = -1
        while sent != self.version:
            sent = self.version
            for number, engine in enumerate(self.engines):
                self.env.process(self._receive(engine, sent, *self._transfer(number)))
            whole = max(sum(self._transfer(number)) for number in range(len(self.engines)))
            yield self.env.timeout(whole)
            self.syncs.append(whole)
        self.sending = False

    def _transfer(self, number: int) -> tuple[float, float]:
        """Seconds until an engine's transfer begins, and those in which it stands still."""
        one, engines = self.loads.weights, len(self.engines)
        if self.design.broadcast is Broadcast.flat:
            return number * one, one
        if self.design.broadcast is Broadcast.tree:
            depth = int(math.log2(number + 1))
            leaf = 2 * number + 1 >= engines
            return depth * 2 * one, one if leaf else 3 * one  # receives, then sends to two
        return 0.0, one * (1 + engines / 256)  # pieces of a 256th

    def _receive(self, engine: _Engine, version: int, wait: float, still: float) -> Events:
        yield self.env.timeout(wait)
        if not self.design.in_flight:  # as long as the longest of what it has begun, on average
            still += self.loads.group
        engine.hold(self.env.now, still)
        yield self.env.timeout(still)
        engine.version = max(engine.version, version)
        self._tell(engine)

    def _message(self) -> Events:
        if self.loads.message <= 0:
            return
        with self.draws.choice(self.hubs).request() as turn:
            yield turn
            yield self.env.timeout(self.loads.message)

    def _deaths(self, engine: _Engine) -> Events:
        while True:
            yield self.env.timeout(self.draws.expovariate(1 / self.loads.mtbf))
            engine.deaths += 1
            engine.hold(self.env.now, self.loads.restart)
