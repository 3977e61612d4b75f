"""The queue's process may die at any moment, and the run may go back to a checkpoint: nothing is lost."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from replay_kit import StubJudge, StubLearner, StubRollout, connected, make_config, run, running, turn
from test_replay_flow import QUESTIONS, World

from caprl_async.data.rows import Row
from caprl_async.replay.events import Event, LedgerError
from caprl_async.replay.flow import TrainFlow
from caprl_async.replay.hub import ReplayQueue
from caprl_async.replay.ledger import Ledger, audit_file
from caprl_async.replay.lives import Prepared
from caprl_async.replay.saved import Saved, read_saved, recover, restore, save, write_note
from caprl_async.replay.transport import HubKeys
from caprl_async.types import ImageRef, Judged, JudgeLease, Version


class Mortal(World):
    """A world whose hub is killed, and whose learner goes back to checkpoints."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.saved: tuple[Saved, int] | None = None  # and the number of batches then
        self.crashes = self.rollbacks = 0

    def step(self, choice: int) -> None:
        if choice % 13 == 5:
            self.commit()
        elif choice % 13 == 7:
            self.crash()
        elif choice % 29 == 3 and self.flow.queue.cut is None:
            self.commit()
            self.saved = save(self.flow), len(self.batches)
        elif choice % 29 == 9 and self.saved is not None:
            self.go_back()
        elif choice % 29 == 15 and self.saved is not None:
            self.commit()
            self.ledger.fold(self.saved[0].position)
        else:
            super().step(choice)

    def commit(self) -> None:
        write_note(self.flow)
        self.ledger.commit()

    def crash(self) -> None:
        """SIGKILL: what was not committed is gone, and so is all memory."""
        self.crashes += 1
        if self.ledger.dirty:
            self.ledger._db.execute("rollback")
        self.ledger._db.close()
        self.ledger = Ledger(self.ledger.path)
        self.flow = TrainFlow(self.config, self.ledger, lambda source, text: None)
        found = recover(self.flow, [self._row(index) for index in self.ledger.lives.live])
        self.flow.is_open = True
        held = {(work.key, work.attempt): engine for work, engine in self.generating}
        self.judging = []
        self.generating = [
            (work, held[work.key, work.attempt]) for work in found if (work.key, work.attempt) in held
        ]
        for work in found:  # nobody has it: the lease was written and never sent
            if (work.key, work.attempt) not in held:
                self.flow.failed(work, "nobody holds it", self.now, lost=True)

    def go_back(self) -> None:
        assert self.saved is not None
        self.rollbacks += 1
        saved, batches = self.saved
        version = Version(self.flow.version.epoch + 1, saved.version.step)
        restore(self.flow, saved, version, [self._row(index) for index in saved.outstanding])
        self.commit()
        self.generating, self.judging = [], []
        del self.batches[batches:]
        self.saved = None

    def _row(self, index: int) -> Prepared:
        image = ImageRef(sha256=str(index), path="")
        return Prepared(index, Row(f"row-{index}", b"", "", QUESTIONS), image)

    def _learn(self) -> None:
        version = self.flow.version
        cut = self.flow.cut(version, self.now)
        if cut is None:
            return
        self.commit()  # as the hub does before it sends a batch
        if self.failures and version.step % 3 == 1:
            self.crash()
            again = self.flow.cut(version, self.now + 1.0)
            assert again is not None
            assert again.reply == cut.reply, "another rank would get another batch"
        for scored in cut.batch.groups:
            assert self.flow.fresh(scored.group)
        self.batches.append([scored.index for scored in cut.batch.groups])
        self.flow.advance(Version(version.epoch, version.step + 1))
        self.commit()


@settings(max_examples=40)
@given(
    script=st.lists(st.integers(0, 4000), min_size=80, max_size=400),
    max_staleness=st.integers(0, 3),
    batch_groups=st.integers(1, 4),
)
def test_whenever_the_queue_dies_or_goes_back_every_prompt_ends_once(
    script: list[int], max_staleness: int, batch_groups: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = Mortal(Path(folder), max_staleness=max_staleness, batch_groups=batch_groups)
        for choice in script:
            world.step(choice)
        world.failures = False
        done = len(world.batches)
        for _ in range(40 * batch_groups * (max_staleness + 2)):
            for choice in (0, 1, 2, 3):
                World.step(world, choice)
        assert len(world.batches) > done, "the ring stands still"
        trained = Counter(index for batch in world.batches for index in batch)
        assert set(trained.values()) <= {1}
        audit = world.ledger.audit(max_staleness)
        assert (audit["violations"], audit["lost"], audit["doubled"]) == ([], 0, 0)
        assert audit["ended"]["trained"] == len(trained)
        world.ledger.close()


def test_a_killed_hub_goes_on_with_the_work_that_is_under_way(tmp_path: Path) -> None:
    """Captions begun before its death are taken from the same rollout; the learner gets the same batches."""

    async def whole() -> None:
        config, keys = make_config(tmp_path), HubKeys.make()
        rollout, judge = StubRollout(slots=6), StubJudge()
        async with running(config, tmp_path, keys) as (first, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await first.open_admission()
            rollout.delay = lambda: 2.0 if rollout.version.step else 0.0
            await turn(first, learner, rollout, 0)
            while sum(state is Event.GENERATING for state, _ in first._ledger.lives.live.values()) < 4:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # a tick: the leases are on disk
            await kill(first)
            port = int(address.endpoint.rpartition(":")[2])
            async with running(config, tmp_path, keys, port=port, again=True) as (second, again):
                assert again.endpoint == address.endpoint
                rollout.delay = lambda: 0.0
                await turn(second, learner, rollout, 1)
                await turn(second, learner, rollout, 2)
                seen = Counter((prompt.key, prompt.attempt) for prompt in rollout.seen)
                assert max(seen.values()) == 1, "captions were made twice"
                audit = await second.audit()
                assert (audit["violations"], audit["retried"]) == ([], {})
                assert audit["ended"]["trained"] == 12

    run(whole())


async def kill(queue: ReplayQueue) -> None:
    """As far as the others can tell: its socket is gone, and what was not committed is lost."""
    for task in queue._tasks:
        task.cancel()
    await asyncio.wait(queue._tasks)
    queue._socket.close()
    if queue._ledger.dirty:
        queue._ledger._db.execute("rollback")
    queue._ledger._db.close()
    queue._tasks = []


def test_a_full_disk_is_one_clear_error_and_costs_nothing_that_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.record("train/0", 0, 0, Event.ADMITTED, Version(0, 0))
    ledger.commit()
    pages = ledger._db.execute("pragma page_count").fetchone()[0]
    ledger._db.execute(f"pragma max_page_count = {pages}")

    def fill() -> None:
        for index in range(1, 10_000):
            ledger.record(f"train/{index}", index, 0, Event.ADMITTED, Version(0, 0), filler="x" * 500)

    with pytest.raises(LedgerError, match=r"l cannot be written: .*full.*free space"):
        fill()
    ledger._db.close()
    assert audit_file(tmp_path / "l", 0)["admitted"] == 1


def test_old_prompts_become_totals_when_the_ledger_is_too_large(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.replay.ledger_mb = 0
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            for step in range(2):
                await turn(queue, learner, rollout, step)
            (tmp_path / "first").mkdir()
            await queue.save(str(tmp_path / "first"))
            for step in range(2, 4):
                await turn(queue, learner, rollout, step)
            before = queue._ledger.audit(2)
            queue._ledger.fold(read_saved(tmp_path / "first").position)
            assert queue._ledger.audit(2) == before
            await queue.trim(str(tmp_path / "first"))  # once more does nothing
            keys = {row.key for row in queue._ledger.rows()}
            assert "train/0" not in keys
            assert "train/8" in keys
            await queue.restore(str(tmp_path / "first"), Version(1, 2))
            rollout.version = Version(1, 2)
            for step in range(2, 4):
                await learner.batch(Version(1, step))
                await queue.trained(Version(1, step + 1), 0.0, 1.0)
                rollout.version = Version(1, step + 1)
            audit = await queue.audit()
            assert (audit["violations"], audit["ended"]["trained"]) == ([], 16)

    run(whole())


class OldJudge(StubJudge):
    """What it is asked while it is `old` scores in the opposite order."""

    old = False

    async def handle(self, lease: JudgeLease) -> Judged:
        old = self.old
        answer = await super().handle(lease)
        return replace(answer, verdicts=answer.verdicts[::-1]) if old else answer


def test_work_that_is_handed_out_while_a_checkpoint_is_read_is_of_the_old_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout, judge = StubRollout(), OldJudge()
        loop = asyncio.get_running_loop()
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, rollout, judge) as peers,
        ):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            rollout.delay = judge.delay = lambda: 1.0
            while not (await queue.status())["states"].get("generating"):
                await asyncio.sleep(0.01)
            (tmp_path / "cut").mkdir()
            await queue.save(str(tmp_path / "cut"))
            assert read_saved(tmp_path / "cut").outstanding
            rollout.delay, judge.old = lambda: 0.0, True
            put = queue._put

            def slow(*args: Any) -> Prepared:
                for peer in peers:  # a heartbeat: the hub hands out what it can
                    loop.call_soon_threadsafe(peer.announce)
                time.sleep(0.1)
                return put(*args)

            def back(*args: Any) -> None:
                judge.delay, judge.old = lambda: 0.0, False
                restore(*args)

            monkeypatch.setattr(queue, "_put", slow)
            monkeypatch.setattr("caprl_async.replay.hub.restore", back)
            await queue.restore(str(tmp_path / "cut"), Version(1, 1))
            rollout.version = Version(1, 1)
            peers[0].announce()  # the same prompts are captioned again before the judge answers
            for step in range(1, 4):
                batch = await turn(queue, learner, rollout, step, epoch=1)
                assert [[row[0].score for row in group.verdicts] for group in batch.groups] == [
                    [0, 1 / 3, 2 / 3]
                ] * 4
            audit = await queue.audit()
            assert (audit["violations"], audit["doubled"]) == ([], 0)

    run(whole())


def test_what_an_audit_makes_durable_can_be_gone_on_from(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, StubRollout(), StubJudge()),
        ):
            await queue.open_admission()
            for _ in range(40):
                await queue.audit()
                shutil.rmtree(tmp_path / "copy", ignore_errors=True)
                (tmp_path / "copy").mkdir()
                for file in tmp_path.glob("ledger.sqlite*"):
                    shutil.copy(file, tmp_path / "copy" / file.name)
                ledger = Ledger(tmp_path / "copy" / "ledger.sqlite")
                flow = TrainFlow(config, ledger, lambda source, text: None)
                recover(
                    flow, [queue._put(queue._train, i, queue._sampler.row_at(i)) for i in ledger.lives.live]
                )
                assert flow.queue.cursor == ledger.lives.newest + 1
                ledger.close()
                if ledger.lives.admitted >= 8:
                    break
                await asyncio.sleep(0.02)
            assert ledger.lives.admitted

    run(whole())


def test_a_run_folder_of_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            (tmp_path / "cut").mkdir()
            await queue.save(str(tmp_path / "cut"))
        async with running(config, tmp_path) as (queue, _):
            with pytest.raises(LedgerError, match="holds another run"):
                await queue.open_admission()
            await queue.restore(str(tmp_path / "cut"), Version(1, 1))  # as CapRL.from_checkpoint does
            await queue.open_admission()

    run(whole())


def test_captions_that_a_checkpoint_holds_are_not_made_again(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout = StubRollout(slots=12)
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            while len(queue._flow.queue.ready) < 8:
                await asyncio.sleep(0.01)
            await queue.save(str(tmp_path))
            assert len(read_saved(tmp_path).kept) >= 8
            made = len(rollout.seen)
            await queue.pause_admission()
            await queue.restore(str(tmp_path), Version(1, 1))
            batch = await learner.batch(Version(1, 1))
            assert {scored.group.oldest for scored in batch.groups} <= {Version(0, 0), Version(0, 1)}
            assert len(rollout.seen) == made
            assert (await queue.audit())["violations"] == []

    run(whole())


def test_a_damaged_queue_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "queue.msgpack").write_bytes(b"\x81\xa7version")
    with pytest.raises(LedgerError, match=r"queue\.msgpack"):
        read_saved(tmp_path)


def test_the_ledger_keeps_every_caption_with_its_verdicts(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout = StubRollout()
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await learner.batch(Version(0, 0))
            await queue.trained(Version(0, 1), 0.0, 1.0, [[-1.0, 0.0, 1.0]] * 4)

    run(whole())
    with sqlite3.connect(tmp_path / "ledger.sqlite") as rows:
        (seq,) = rows.execute("select seq from events where key = 'train/0' and event = 'ready'").fetchone()
        samples = rows.execute("select position, text, reward, spans from samples where seq = ?", (seq,))
        assert [row[:3] for row in samples] == [
            (i, f"train/0 caption {i}", pytest.approx(i / 3)) for i in range(3)
        ]
        peer, questions = rows.execute("select peer, questions from judged where seq = ?", (seq,)).fetchone()
        assert peer == "judge-0"
        assert "what color is it ?" in questions
        (detail,) = rows.execute(
            "select detail from events where key = 'train/0' and event = 'trained'"
        ).fetchone()
        assert "[-1.0, 0.0, 1.0]" in detail
