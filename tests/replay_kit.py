"""Made-up captions, verdicts and peers for the tests of the queue."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import zmq.asyncio
from PIL import Image

from caprl_async.config import Config
from caprl_async.replay.hub import ReplayQueue
from caprl_async.replay.peer import LearnerPeer, Peer
from caprl_async.replay.transport import HubAddress, HubKeys, connect
from caprl_async.types import (
    Caption,
    CaptionGroup,
    Finish,
    Generated,
    GenerateLease,
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


def run(coroutine: Any, timeout: float = 40.0) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout))


async def turn(queue: Any, learner: StubLearner, rollout: StubRollout, step: int, epoch: int = 0) -> Any:
    """One learner step: the batch, then the new version at hub and engine."""
    batch = await learner.batch(Version(epoch, step))
    await queue.trained(Version(epoch, step + 1), 10.0 + step, 11.0 + step)
    rollout.version = Version(epoch, step + 1)
    return batch


def caption(text: str, *versions: Version) -> Caption:
    """Two tokens under each version."""
    length = 2 * len(versions)
    spans = tuple(VersionSpan(v, 2 * i, 2 * i + 2) for i, v in enumerate(versions))
    return Caption(
        text=text,
        token_ids=tuple(range(1, length + 1)),
        logprobs=(-0.5,) * length,
        spans=spans,
        finish=Finish.STOP,
    )


def group(prompt: Prompt, *versions: Version, actor: str = "rollout-0") -> CaptionGroup:
    return CaptionGroup(
        key=prompt.key,
        attempt=prompt.attempt,
        prompt_token_ids=(5, 6, 7),
        image_sha256=prompt.image.sha256,
        image_grid=((1, 2, 2),),
        captions=tuple(caption(f"{prompt.key} caption {i}", *versions) for i in range(prompt.sampling.n)),
        actor=actor,
        started=1.0,
        finished=2.0,
    )


def verdict(question: Question, score: float) -> Verdict:
    return Verdict(
        question_id=question.question_id,
        outcome=Outcome.SCORED,
        score=score,
        abstained=0.0,
        off_options=0.0,
        choice=question.choices[question.answer] if question.answer is not None else "unknown",
    )


def verdicts(questions: tuple[Question, ...], captions: int) -> tuple[tuple[Verdict, ...], ...]:
    """The i-th of n captions scores i / n on everything."""
    return tuple(tuple(verdict(q, i / captions) for q in questions) for i in range(captions))


def unscored(questions: tuple[Question, ...], captions: int, outcome: Outcome) -> Any:
    row = tuple(Verdict(question_id=q.question_id, outcome=outcome, draws=0) for q in questions)
    return (row,) * captions


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed % 256, seed // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(path: Path, rows: int, *, stem: str = "what color is it ?", **columns: list[Any]) -> Path:
    """A CapRL-QA file of tiny images with a fact question and an absent one each."""
    questions = [
        {"question": stem, "choices": ["A) red", "B) blue"], "answer": "B"},
        {"question": "what shape is green ?", "choices": ["A) star", "B) unknown"], "answer": "B"},
    ]
    table = {
        "id": [f"row-{i}" for i in range(rows)],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(rows)],
        "prompt": [[{"role": "user", "content": "<image> describe ."}]] * rows,
        "reward_model": [{"ground_truth": questions}] * rows,
        "reference_caption": [f"reference {i}" for i in range(rows)],
        "facts": ["{}"] * rows,
        **columns,
    }
    pq.write_table(pa.table(table), path)
    return path


def make_config(folder: Path, rows: int = 12) -> Config:
    config = Config()
    config.data.train = str(write_data(folder / "train.parquet", rows))
    config.data.heldout = str(write_data(folder / "heldout.parquet", 5))
    config.data.shuffle = False
    config.data.prompt = ""
    config.judge.prompt.abstain = "unknown"
    config.rollout.group_size = 3
    config.replay.batch_groups = 4
    config.replay.max_staleness = 2
    config.evaluate.probe_images = 0
    return config


class StubRollout:
    """Captions at once (or after `delay`) under `version`."""

    def __init__(self, name: str = "rollout-0", incarnation: str = "1", slots: int = 4) -> None:
        self.hello = Hello(role=Role.ROLLOUT, name=name, incarnation=incarnation)
        self.version = Version(0, 0)
        self.slots = slots
        self.delay: Callable[[], float] = lambda: 0.0
        self.seen: list[Prompt] = []

    async def handle(self, lease: GenerateLease) -> Generated:
        self.seen.append(lease.prompt)
        begun = self.version
        await asyncio.sleep(self.delay())
        versions = (begun,) if begun == self.version else (begun, self.version)
        return Generated(lease=lease.lease, group=group(lease.prompt, *versions, actor=self.hello.name))

    def stats(self) -> dict[str, Any]:
        now = time.monotonic()
        return {"version": self.version, "busy_s": now / 2, "alive_s": now}


class StubJudge:
    """Answers at once (or after `delay`): the i-th of n captions scores i / n."""

    def __init__(self, name: str = "judge-0", serves: str = "judge", incarnation: str = "1") -> None:
        self.hello = Hello(role=Role.JUDGE, name=name, incarnation=incarnation, serves=serves)
        self.slots = 2
        self.delay: Callable[[], float] = lambda: 0.0
        self.seen: list[JudgeLease] = []

    async def handle(self, lease: JudgeLease) -> Judged:
        self.seen.append(lease)
        await asyncio.sleep(self.delay())
        return Judged(lease=lease.lease, verdicts=verdicts(lease.questions, len(lease.captions)))

    def stats(self) -> dict[str, Any]:
        now = time.monotonic()
        return {"busy_s": now / 4, "alive_s": now}


@asynccontextmanager
async def connected(address: HubAddress, *stubs: Any) -> AsyncIterator[list[Peer]]:
    """Serves the stubs until the end of the block."""
    peers = [Peer(address, stub.hello) for stub in stubs]
    tasks = [
        asyncio.create_task(peer.serve(stub.handle, stub.slots, stub.stats))
        for peer, stub in zip(peers, stubs, strict=True)
    ]
    try:
        yield peers
    finally:
        for peer in peers:
            await peer.close()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def running(
    config: Config, run_dir: Path, keys: HubKeys | None = None, **start: Any
) -> AsyncIterator[tuple[ReplayQueue, HubAddress]]:
    queue = ReplayQueue(config, str(run_dir))
    try:
        yield queue, await queue.start(keys or HubKeys.make(), **start)
    finally:
        for learner in StubLearner.all:
            learner.close()
        StubLearner.all.clear()
        await queue.stop()


class StubLearner:
    """A learner rank in a thread, as the real one is; `running` closes those of a test."""

    all: ClassVar[list[StubLearner]] = []

    def __init__(self, address: HubAddress, name: str = "learner-0") -> None:
        self._peer = LearnerPeer(address, Hello(role=Role.LEARNER, name=name, incarnation="1"))
        StubLearner.all.append(self)

    async def batch(self, version: Version, timeout_s: float = 20.0) -> Any:
        return await asyncio.to_thread(self._peer.request_batch, version, timeout_s)

    def close(self) -> None:
        self._peer.close()


@asynccontextmanager
async def bare_socket(address: HubAddress, identity: str) -> AsyncIterator[Any]:
    """A connected DEALER that says nothing of its own."""
    context = zmq.asyncio.Context()
    try:
        yield connect(context, address, identity)
    finally:
        context.destroy(linger=0)


def shuffled(seed: int, top: float) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: generator.random() * top
