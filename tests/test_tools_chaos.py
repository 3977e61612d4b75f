"""The chaos tool: its plan, what it reads from titles and ledger, and that its audit finds planted faults."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from replay_kit import StubJudge, StubLearner, StubRollout, connected, make_config, run, running, turn

from caprl_async.config import Config
from caprl_async.replay.events import Event, EventRow, surviving
from caprl_async.replay.ledger import Ledger, read_rows
from caprl_async.replay.samples import recorded_batch
from caprl_async.replay.transport import encode
from caprl_async.types import BatchReply, Outcome, ScoredGroup, Verdict, Version

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.append(str(TOOLS))

import chaos  # noqa: E402
import chaos_ring  # noqa: E402
from chaos import Killed  # noqa: E402
from chaos_audit import Audit, audit, choose, differences, stuck  # noqa: E402
from chaos_ring import PHASES, Mark, first_sign, phases, plan  # noqa: E402

ROLES = ["rollout", "judge", "queue", "learner", "driver"]

# ---------------------------------------------------------------- the plan


def test_every_role_meets_every_phase_once_in_each_round() -> None:
    planned = plan(0, 50, ROLES)
    cells = {(role, phase) for role in ROLES for phase in PHASES}
    for first in (0, 25):
        assert {(kill.role, kill.phase) for kill in planned[first : first + 25]} == cells
        kinds = Counter(kill.kind for kill in planned[first : first + 25])
        assert kinds == {"kill": 19, "stop": 4, "memory": 2}
    assert not [kill for kill in planned if kill.role == "driver" and kill.kind == "memory"]


def test_a_longer_plan_begins_as_a_shorter_one_and_another_seed_is_another_plan() -> None:
    assert plan(7, 80, ROLES)[:33] == plan(7, 33, ROLES)
    assert plan(7, 25, ROLES) != plan(8, 25, ROLES)
    order = [(kill.role, kill.phase) for kill in plan(7, 50, ROLES)]
    assert order[:25] != order[25:]


def test_the_roles_take_turns() -> None:
    planned = plan(0, 50, ROLES)
    for first in range(0, 50, len(ROLES)):
        assert {kill.role for kill in planned[first : first + len(ROLES)]} == set(ROLES)
    assert {kill.kind for kill in plan(0, 50, ROLES, ["kill", "stop"])} == {"kill", "stop"}


def test_a_slice_that_was_cut_off_goes_on_with_the_kill_that_is_missing(tmp_path: Path) -> None:
    made = chaos.Chaos(tmp_path, [], chaos.Console(stderr=True))
    assert made.done() == []
    for index in range(3):
        chaos._append(tmp_path / "kills.jsonl", chaos.asdict(killed(index, "judge", 1.0)))
    again = chaos.Chaos(tmp_path, [], chaos.Console(stderr=True))
    assert [kill.index for kill in plan(0, 5, ROLES)[len(again.done()) :]] == [3, 4]


# ---------------------------------------------------------------- titles


@pytest.mark.parametrize(
    ("title", "name", "shown"),
    [
        ("ray::rollout-0: captioning, receiving 0.12", "rollout-0", {"generation", "transfer"}),
        ("ray::judge-0: judging", "judge-0", {"judging"}),
        ("ray::learner-0: training 0.12, sending 0.11", "learner-0", {"step", "transfer"}),
        ("ray::learner-0: writing a checkpoint", "learner-0", {"checkpoint"}),
        ("ray::learner-0: copying its state", "learner-0", {"checkpoint"}),
        ("ray::replay-queue", "replay-queue", set()),
        ("ray::RolloutActor.start", "RolloutActor.start", set()),
        ("ray::IDLE", "IDLE", set()),
        ("python -m judging: training", "", set()),
        ("", "", set()),
    ],
)
def test_a_title_tells_whose_it_is_and_the_phase(title: str, name: str, shown: set[str]) -> None:
    assert chaos_ring.named(title) == name
    assert not title.startswith("ray::") or phases(title) == shown


def test_the_title_of_an_actor_is_its_own_whatever_is_called(tmp_path: Path) -> None:
    """Ray would write the name of each method there."""
    script = """
import asyncio, os, ray
from caprl_async.process import call_me, doing

class Actor:
    async def start(self):
        self.begun, self.over = asyncio.Event(), asyncio.Event()
        call_me("rollout-0")
    async def pid(self): return os.getpid()
    async def caption(self):
        with doing("captioning"):
            self.begun.set()
            await self.over.wait()
    async def until_begun(self): await self.begun.wait()
    async def end(self): self.over.set()

def show():
    with open(f"/proc/{pid}/cmdline") as file: print(file.read().strip(chr(0) + " "), flush=True)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
actor = ray.remote(Actor).options(num_cpus=0).remote()
ray.get(actor.start.remote())
pid = ray.get(actor.pid.remote())
show()
working = actor.caption.remote()
ray.get([actor.until_begun.remote(), *(actor.pid.remote() for _ in range(3))])
show()
ray.get([actor.end.remote(), working])
show()
"""
    env = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=300
    )
    shown = [line for line in done.stdout.splitlines() if line.startswith("ray::")]
    assert shown == ["ray::rollout-0", "ray::rollout-0: captioning", "ray::rollout-0"], done.stderr


# ---------------------------------------------------------------- recovery


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Killed at 100; every kind of sign once before it served and once after."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    rows = [
        (1, 99.0, "judging", "0.7", {"peer": "rollout-0", "started": 98.0}),
        (2, 100.5, "judging", "0.7", {"peer": "rollout-0", "started": 99.5}),  # was on its way
        (3, 100.6, "step", "0.8", {"started": 99.0, "finished": 100.5}),
        (4, 101.0, "ready", "0.8", {}),  # judged before the kill
        (5, 103.0, "judging", "0.8", {"peer": "rollout-1", "started": 102.0}),  # another's
        (6, 104.0, "ready", "0.8", {}),
        (7, 109.0, "judging", "0.8", {"peer": "rollout-0", "started": 108.0}),
        (8, 111.0, "step", "0.9", {"started": 110.0, "finished": 111.0}),
        (9, 112.0, "step", "1.9", {"started": 111.0, "finished": 112.0}),
    ]
    with closing(sqlite3.connect(path)) as db, db:
        for seq, at, event, version, detail in rows:
            db.execute(
                "insert into events values(?, ?, 'k', 0, 0, ?, ?, ?)",
                (seq, at, event, version, json.dumps(detail)),
            )
            if event == "ready":
                db.execute("insert into judged values(?, 'judge-0', 0, '[]', x'')", (seq,))
    return path


@pytest.mark.parametrize(
    ("role", "served"),
    [("rollout", 109.0), ("judge", 104.0), ("queue", 103.0), ("learner", 112.0), ("driver", 111.0)],
)
def test_a_part_is_back_when_the_ledger_shows_its_work(ledger: Path, role: str, served: float) -> None:
    assert first_sign(ledger, role, Mark(1, 0), killed=100.0, back=102.5) == served
    assert first_sign(ledger, role, Mark(9, 1), killed=120.0, back=122.0) is None


def killed(index: int, role: str, served: float | None, seen: bool = True, code: int | None = None) -> Killed:
    return Killed(index, role, "step", "kill", seen, "ray::x", 100.0, 7, "0", None, served, code)


def test_the_table_and_the_last_line() -> None:
    done = [
        killed(0, "judge", 4.0),
        killed(1, "judge", 8.0),
        killed(2, "learner", 20.0, seen=False),
        killed(3, "learner", None, code=1),
    ]
    table = {row[0]: row[1:] for row in chaos.rows(done)}
    assert table["judge"] == ("2", "2", "6.0", "8.0")
    assert table["learner"] == ("2", "1", "20.0", "20.0")
    assert table["mid-step"] == ("3", "2", "6.0", "8.0")
    assert table["phase not met"] == ("1", "1", "20.0", "20.0")
    assert table["all"] == ("4", "3", "8.0", "20.0")
    last = chaos.totals(done, Audit(lost=["a"], false_rewards=["b", "c"]), ["7 ray::IDLE"])
    assert (last["kills"], last["lost"], last["doubled"], last["false_rewards"]) == (4, 1, 0, 2)
    assert (last["orphans"], last["recovery_median_s"], last["recovery_max_s"]) == (1, 8.0, 20.0)
    assert (last["not_recovered"], last["ended"]) == (1, 1)


# ---------------------------------------------------------------- the audit

STEPS = 3


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Config]:
    """A run of the queue with made-up engines, all of it recorded."""
    config = make_config(tmp_path, rows=40)
    config.observe.record_batches = True
    folder = tmp_path / "run"

    async def scenario() -> None:
        rollout = StubRollout()
        async with (
            running(config, folder) as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            await queue.open_admission()
            learner = StubLearner(address)
            for step in range(STEPS):
                await turn(queue, learner, rollout, step)

    run(scenario())
    return folder, config


def test_a_sound_run_passes(trained: tuple[Path, Config]) -> None:
    folder, config = trained
    found = audit(folder, config, rejudge=0)
    assert found.by_kind() == (("lost", []), ("doubled", []), ("false reward", []), ("other", []))
    assert (found.steps, found.groups) == (STEPS, STEPS * config.replay.batch_groups)


def change(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as db, db:
        db.execute(statement)


def test_a_prompt_that_is_trained_on_twice_is_found(trained: tuple[Path, Config]) -> None:
    folder, config = trained
    change(
        folder,
        "insert into events select (select max(seq) + 1 from events), time, key, prompt_index, attempt, "
        "event, version, detail from events where event = 'trained' limit 1",
    )
    found = audit(folder, config, rejudge=0)
    assert len(found.doubled) == 1
    assert any("has ended" in text for text in found.other)


def test_a_prompt_that_is_passed_over_is_found(trained: tuple[Path, Config]) -> None:
    folder, config = trained
    live = {row.index for row in surviving(read_rows(folder / "ledger.sqlite")) if row.index is not None}
    change(folder, f"delete from events where prompt_index = {sorted(live)[-2]}")
    assert len(audit(folder, config, rejudge=0).lost) == 1


def test_a_prompt_that_nobody_works_on_is_found() -> None:
    first = EventRow(1, "train/0", 0, 0, Event.ADMITTED, Version(0, 0), {}, 0.0)
    steps = [EventRow(2 + i, "", None, None, Event.STEP, Version(0, i), {}, 10.0 * i) for i in range(30)]
    assert len(stuck([first, *steps], 100.0)) == 1
    assert not stuck([first, *steps], 1000.0)
    assert not stuck([first, *steps[:15]], 100.0)
    ended = EventRow(40, "train/0", 0, 0, Event.EVICTED, Version(0, 30), {}, 300.0)
    assert not stuck([first, *steps, ended], 100.0)


def rewrite(path: Path, edit: Callable[[ScoredGroup], ScoredGroup]) -> None:
    """Changes the first group of a recorded batch."""
    batch = recorded_batch(path)
    groups = (edit(batch.groups[0]), *batch.groups[1:])
    path.write_bytes(encode(BatchReply(batch=msgspec.structs.replace(batch, groups=groups))))


def other_reward(scored: ScoredGroup) -> ScoredGroup:
    best = msgspec.structs.replace(scored.rewards[0], total=1.0)
    return msgspec.structs.replace(scored, rewards=(best, *scored.rewards[1:]))


def other_row(scored: ScoredGroup) -> ScoredGroup:
    return msgspec.structs.replace(scored, row_id="row-39")


def other_verdicts(scored: ScoredGroup) -> ScoredGroup:
    """Of its neighbour; the rewards fit them."""
    return msgspec.structs.replace(scored, verdicts=scored.verdicts[1:2] * 3, rewards=scored.rewards[1:2] * 3)


def failed_verdict(scored: ScoredGroup) -> ScoredGroup:
    down = msgspec.structs.replace(scored.verdicts[0][0], outcome=Outcome.JUDGE_DOWN, score=None)
    first = (down, *scored.verdicts[0][1:])
    return msgspec.structs.replace(scored, verdicts=(first, *scored.verdicts[1:]))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (other_reward, "trained on"),
        (other_row, "the sampler says"),
        (other_verdicts, "other verdicts"),
        (failed_verdict, "could not be had"),
    ],
)
def test_a_false_reward_is_found(
    trained: tuple[Path, Config], edit: Callable[[ScoredGroup], ScoredGroup], said: str
) -> None:
    folder, config = trained
    rewrite(folder / "batches" / "000-000001.msgpack", edit)
    found = audit(folder, config, rejudge=0)
    assert any(said in text for text in found.false_rewards)
    assert all("of batch 0.1" in text for text in found.false_rewards)


def test_a_missing_batch_and_one_of_other_groups_are_found(trained: tuple[Path, Config]) -> None:
    folder, config = trained
    batches = folder / "batches"
    (batches / "000-000002.msgpack").write_bytes((batches / "000-000000.msgpack").read_bytes())
    (batches / "000-000001.msgpack").unlink()
    found = audit(folder, config, rejudge=0)
    assert any("batch 0.1 is missing" in text for text in found.other)
    assert any("000-000002.msgpack holds" in text for text in found.other)
    assert found.doubled  # the groups of the first batch, again


def test_what_was_trained_soon_after_a_kill_is_judged_again_first(trained: tuple[Path, Config]) -> None:
    folder, _ = trained
    kept = surviving(read_rows(folder / "ledger.sqlite"))
    batches = {
        Version(0, step): recorded_batch(folder / "batches" / f"000-{step:06d}.msgpack")
        for step in range(STEPS)
    }
    second = next(row for row in kept if row.event is Event.STEP and row.version.step == 2)
    chosen = choose(batches, kept, [second.time - 1e-6], captions=24, seed=0)
    after = {scored.index for step in (1, 2) for scored in batches[Version(0, step)].groups}
    assert {scored.index for scored in chosen} == after
    assert len(choose(batches, kept, [], captions=1000, seed=0)) == STEPS * 4


def test_scores_may_differ_by_arithmetic_only() -> None:
    def verdict(score: float | None, outcome: Outcome = Outcome.SCORED) -> tuple[Verdict, ...]:
        return (Verdict(question_id="q", outcome=outcome, score=score),)

    assert not differences(verdict(0.5), verdict(0.5 + 1e-5))
    assert len(differences(verdict(0.5), verdict(0.51))) == 1
    assert len(differences(verdict(0.5), verdict(None, Outcome.UNSCORABLE))) == 1


# ---------------------------------------------------------------- real kills


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_real_kills_lose_double_and_falsify_nothing(tmp_path: Path) -> None:
    done: Any = subprocess.run(
        [
            *(
                sys.executable,
                str(TOOLS / "chaos.py"),
                "--kills",
                "3",
                "--roles",
                "rollout",
                "queue",
                "learner",
            ),
            *("--kinds", "kill", "--rejudge", "40", "--out", str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        timeout=580,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert {name: last[name] for name in ("kills", "lost", "doubled", "false_rewards", "orphans")} == {
        "kills": 3,
        "lost": 0,
        "doubled": 0,
        "false_rewards": 0,
        "orphans": 0,
    }
    assert last["not_recovered"] == last["other"] == 0
    assert last["captions_judged_again"] >= 40
    roles = [json.loads(line)["role"] for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert sorted(roles) == ["learner", "queue", "rollout"]
