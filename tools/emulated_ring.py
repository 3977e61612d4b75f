"""The ring with stages that wait instead of computing, each as if it had a device of its own.

Supervisor, queue, peers, transport, weight sync's control calls and all processes are the real ones; what a
rollout, a judge, the learner and a weight transfer would compute is a wait of a calibrated time. Captions are
made-up words of a given length, so that the messages have their real size.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from caprl_async.config import Config
from caprl_async.engine.engine import START, EngineStats
from caprl_async.judge.actor import JudgeActor
from caprl_async.learner.actor import LearnerActor, StepReport
from caprl_async.process import whereabouts
from caprl_async.ring.supervisor import Supervisor
from caprl_async.rollout.actor import RolloutActor
from caprl_async.types import (
    Caption,
    CaptionGroup,
    Finish,
    Hello,
    Judged,
    JudgeLease,
    Outcome,
    Prompt,
    Question,
    Role,
    Verdict,
    Version,
    VersionSpan,
)
from caprl_async.weights.types import JoinInfo

Span = tuple[float, float, float]
"""(began, ended, seconds of it in which the device worked), the first two of `time.time()`."""


@dataclass(frozen=True)
class Times:
    """Seconds that each stage takes for one batch, and how a device works."""

    rollout: float
    judge: float
    train: float
    snapshot: float  # the learner's copy of its weights, after each step
    publish: float  # a transfer, during which the rollout's device stands still
    lanes: int = 8  # groups that the rollout's and the judge's device work on at one time
    jitter: float = 0.3  # sigma of the logarithm of a group's time
    step_jitter: float = 0.05  # the same of a training step's
    tokens: int = 300  # of a caption
    phases: bool = False  # the judge begins when the whole batch has been captioned

    def group(self, stage: float, batch_groups: int, seed: str) -> float:
        """Seconds of one group on one lane; the same seed has the same luck."""
        return stage * self.lanes / batch_groups * luck(self.jitter, seed)


def luck(sigma: float, seed: str) -> float:
    """A factor of mean 1, log-normal."""
    return random.Random(seed).lognormvariate(-sigma * sigma / 2, sigma)


class Device:
    """Works on up to `lanes` pieces at one time; a stop holds up all of them."""

    def __init__(self, lanes: int) -> None:
        self.spans: list[Span] = []
        self.stops: list[Span] = []
        self._places = asyncio.Semaphore(lanes)
        self._held = 0.0  # seconds of all stops so far
        self._awake = 0.0  # when the last stop ends

    async def work(self, seconds: float) -> None:
        async with self._places:
            began = time.time()
            end = max(began, self._awake) + seconds
            while (left := end - time.time()) > 0:
                held = self._held
                await asyncio.sleep(left)
                end += self._held - held
            self.spans.append((began, time.time(), seconds))

    async def stop(self, seconds: float) -> None:
        began = time.time()
        self._held += seconds
        self._awake = began + seconds
        await asyncio.sleep(seconds)
        self.stops.append((began, time.time(), seconds))


def share(spans: Iterable[Span], begin: float, end: float) -> float:
    """Seconds worked between `begin` and `end`, as a share of that time; several lanes add up."""
    worked = 0.0
    for started, ended, seconds in spans:
        inside = max(0.0, min(ended, end) - max(started, begin))
        worked += seconds * inside / max(ended - started, 1e-9)
    return worked / (end - begin)


class _Idle:
    """Has what the actors ask of an engine or a judge, and computes nothing."""

    died = None
    version = START

    def __init__(self) -> None:
        self._began = time.monotonic()

    def stats(self) -> EngineStats:
        return EngineStats(0.0, time.monotonic() - self._began, 0, 0, 0, 0, 0)

    def close(self) -> None:
        pass


class EmulatedRollout(RolloutActor):
    """Waits, then says made-up words."""

    def __init__(self, name: str, config: Config, hub: Any, times: Times) -> None:
        super().__init__(name, config, hub)
        self._times = times
        self._device = Device(times.lanes)

    def _build(self) -> Any:
        return None, _Idle()

    async def _caption(self, prompt: Prompt) -> CaptionGroup:
        times, started, begun = self._times, time.time(), self.engine.version
        seed = f"rollout {prompt.key} {prompt.attempt}"
        await self._device.work(times.group(times.rollout, self._config.replay.batch_groups, seed))
        spans = version_spans(begun, self.engine.version, times.tokens)
        return CaptionGroup(
            key=prompt.key,
            attempt=prompt.attempt,
            prompt_token_ids=tuple(range(times.tokens)),
            image_sha256=prompt.image.sha256,
            image_grid=((1, 2, 2),),
            captions=tuple(_caption(i, times.tokens, spans) for i in range(prompt.sampling.n)),
            actor=self.name,
            started=started,
            finished=time.time(),
        )

    async def join_weight_group(self, **info: Any) -> None:
        pass

    async def receive_weights(self, *, version: str, **info: Any) -> dict[str, float]:
        await self._device.stop(self._times.publish)
        self._engine.version = Version.parse(version)  # type: ignore[union-attr,misc]
        self.announce()
        return {"total": self._times.publish}

    async def log(self) -> tuple[list[Span], list[Span]]:
        """When the device worked, and when it was stopped."""
        return self._device.spans, self._device.stops


def version_spans(begun: Version, ended: Version, tokens: int) -> tuple[VersionSpan, ...]:
    """Half of the tokens under each version, if there are two."""
    if begun == ended:
        return (VersionSpan(begun, 0, tokens),)
    return (VersionSpan(begun, 0, tokens // 2), VersionSpan(ended, tokens // 2, tokens))


def _caption(number: int, tokens: int, spans: tuple[VersionSpan, ...]) -> Caption:
    return Caption(
        text=f"caption {number} " + "word " * (tokens - 2),
        token_ids=tuple(range(1000, 1000 + tokens)),
        logprobs=tuple(-0.001 * i for i in range(tokens)),
        spans=spans,
        finish=Finish.STOP,
    )


class EmulatedJudge(JudgeActor):
    """Waits, then draws scores. With `phases`, until a whole batch has come."""

    def __init__(self, name: str, serves: str, config: Config, hub: Any, times: Times) -> None:
        super().__init__(name, serves, config, hub)
        self._times = times
        self._groups = config.replay.batch_groups
        self._device = Device(times.lanes)
        self._batch: list[asyncio.Event] = []

    async def start(self) -> dict[str, Any]:
        if self._judge is None:
            self._judge = _Idle()  # type: ignore[assignment]
            self._tasks = [asyncio.create_task(self._serve())]
        return {"name": self.name}

    async def health(self) -> dict[str, Any]:
        return {"name": self.name, "started": self._judge is not None, **whereabouts()}

    async def answer(self, lease: JudgeLease) -> Judged:
        times, seed = self._times, f"judge {lease.key}"
        if times.phases:
            await self._whole_batch()
        await self._device.work(times.group(times.judge, self._groups, seed))
        draw = random.Random(seed)
        rows = [tuple(_verdict(q, draw.random()) for q in lease.questions) for _ in lease.captions]
        return Judged(lease=lease.lease, verdicts=tuple(rows))

    async def _whole_batch(self) -> None:
        mine = asyncio.Event()
        self._batch.append(mine)
        if len(self._batch) == self._groups:
            for waiting in self._batch:
                waiting.set()
            self._batch = []
        await mine.wait()

    async def log(self) -> tuple[list[Span], list[Span]]:
        """When the device worked, and when it was stopped."""
        return self._device.spans, self._device.stops


def _verdict(question: Question, score: float) -> Verdict:
    return Verdict(
        question_id=question.question_id,
        outcome=Outcome.SCORED,
        score=score,
        abstained=0.0,
        off_options=0.0,
        choice=question.choices[0],
    )


class EmulatedLearner(LearnerActor):
    """Takes real batches and sleeps over them."""

    def __init__(self, rank: int, config: Config, hub: Any, times: Times) -> None:
        super().__init__(rank, config, hub)
        self._times = times
        self._spans: list[Span] = []

    def setup(self, world: int, master_addr: str, master_port: int) -> dict[str, Any]:
        from caprl_async.replay.peer import LearnerPeer

        hello = Hello(role=Role.LEARNER, name=repr(self), incarnation=uuid.uuid4().hex)
        self._peer = LearnerPeer(self._hub, hello)
        return {"rank": self.rank}

    def _step(self, version: Version) -> StepReport:
        assert self._peer is not None
        asked = time.time()
        batch = self._peer.request_batch(version, on_wait=self._check_stop)
        started = time.time()
        if batch is None:
            return StepReport(version, started, started, started - asked, done=True)
        time.sleep(self._times.train * luck(self._times.step_jitter, f"train {version}"))
        time.sleep(self._times.snapshot)
        finished = time.time()
        self._spans.append((started, finished, finished - started))
        return StepReport(Version(version.epoch, version.step + 1), started, finished, started - asked)

    def open_weight_group(self, **info: Any) -> list[dict[str, Any]]:
        place = (info["backend"], info["epoch"], info["address"], 0)
        return [asdict(JoinInfo(*place, k, info["timeout_s"])) for k in range(len(info["sizes"]))]

    def send_weights(self, version: Version) -> float:
        time.sleep(self._times.publish)
        return self._times.publish

    def log(self) -> tuple[list[Span], list[Span]]:
        """When the device worked; it is never stopped."""
        return self._spans, []


class EmulatedRing(Supervisor):
    """The supervisor of such a ring, of one rollout, one judge and one learner rank."""

    def __init__(self, config: Config, times: Times) -> None:
        super().__init__(config)
        self._times = times

    def _spawn(self, spec: Any, actor_class: type, *args: Any, group: Any = None) -> Any:
        ours = {RolloutActor: EmulatedRollout, JudgeActor: EmulatedJudge, LearnerActor: EmulatedLearner}
        if actor_class not in ours:
            return super()._spawn(spec, actor_class, *args, group=group)
        return super()._spawn(spec, ours[actor_class], *args, self._times, group=group)

    def logs(self) -> dict[str, tuple[list[Span], list[Span]]]:
        """stage -> its device's spans of work, and its stops."""
        handles = {"rollout": self.rollouts[0], "judge": self.judges[0], "learner": self.learners[0]}
        return {stage: self.get(handle.log.remote()) for stage, handle in handles.items()}
