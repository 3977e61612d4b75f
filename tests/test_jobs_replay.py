"""`job=replay` finds the batches that survive, sees a change in them, and comes to the same parameters."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from replay_kit import run as run_async
from run_kit import Recorded, cut, record, recorded, recorded_config
from safetensors.torch import save_file

from caprl_async import conf
from caprl_async.config import Blind, Config, KLConfig, KLPlace
from caprl_async.jobs import replay as job
from caprl_async.learner import rerun as ranks
from caprl_async.learner.recount import advantages, differences
from caprl_async.learner.rerun import Compared, Message, Rerun, RerunFailed, Stepped, at_home, compared
from caprl_async.replay.events import LedgerError
from caprl_async.replay.ledger import Ledger, read_rows
from caprl_async.replay.line import LineStep, contradictions, surviving_line
from caprl_async.replay.reading import Reading
from caprl_async.replay.samples import batch_path, recorded_batch
from caprl_async.replay.transport import encode
from caprl_async.ring.checkpoints import seal
from caprl_async.run import main
from caprl_async.types import BatchReply, Question, TrainBatch, Version

CONF = f"conf={Path(conf.__file__).parent.parent / 'conf' / 'replay.yaml'}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return recorded(tmp_path_factory.mktemp("replay"))


@pytest.fixture
def copy(done: Recorded, tmp_path: Path) -> Path:
    """A run folder that a test may harm."""
    return Path(shutil.copytree(done.run_dir, tmp_path / "run"))


def surviving_batches(done: Recorded) -> list[TrainBatch]:
    return [done.batches[i] for i in (0, 1, 4, 5)]


def write(path: Path, batch: TrainBatch) -> None:
    path.write_bytes(encode(BatchReply(batch=batch)))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([CONF, f"run={folder}", *arguments]) == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- the line


def test_the_line_is_the_batches_that_no_rollback_has_voided(done: Recorded) -> None:
    line = surviving_line(read_rows(done.ledger))
    assert [step.number for step in line] == [1, 2, 3, 4]
    assert [step.version for step in line] == [Version(0, 0), Version(0, 1), Version(1, 2), Version(1, 3)]
    for step, batch in zip(line, surviving_batches(done), strict=True):
        assert contradictions(step, batch) == []
        assert recorded_batch(batch_path(done.run_dir / "batches", step.version)) == batch
        assert [group.key for group in step.groups] == [scored.group.key for scored in batch.groups]


def test_a_folded_ledger_still_knows_every_step(copy: Path) -> None:
    ledger = Ledger(copy / "ledger.sqlite")
    ledger.fold(ledger.position)
    ledger.close()
    line = surviving_line(read_rows(copy / "ledger.sqlite"))
    assert [str(step.version) for step in line] == ["0.0", "0.1", "1.2", "1.3"]
    assert not any(step.groups for step in line)
    batch = recorded_batch(batch_path(copy / "batches", line[0].version))
    assert contradictions(line[0], batch) == []


def test_a_step_that_is_missing_in_between_is_an_error(copy: Path) -> None:
    with sqlite3.connect(copy / "ledger.sqlite") as ledger:
        ledger.execute("delete from events where event = 'step' and version = '0.2'")
    with pytest.raises(LedgerError, match="from step 1 to step 3"):
        surviving_line(read_rows(copy / "ledger.sqlite"))


def test_contradictions_name_the_groups(done: Recorded) -> None:
    step = surviving_line(read_rows(done.ledger))[0]
    batch = done.batches[0]
    names = [f"{scored.group.key}@{scored.group.attempt}" for scored in batch.groups]
    again = replace(batch.groups[0], group=replace(batch.groups[0].group, attempt=1))
    assert contradictions(step, replace(batch, groups=batch.groups[::-1])) == [
        "its groups are in another order"
    ]
    assert contradictions(step, replace(batch, groups=batch.groups[1:])) == [f"it lacks {names[0]}"]
    assert contradictions(step, replace(batch, groups=(again, *batch.groups[1:]))) == [
        f"the ledger has no {batch.groups[0].group.key}@1 in it",
        f"it lacks {names[0]}",
    ]
    assert contradictions(step, done.batches[1]) == ["it is the batch of version 0.1"]


# ---------------------------------------------------------------- what cannot be executed


def test_missing_batches_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "batches" / "000-000002.msgpack").unlink()  # rolled back: nobody needs it
    (copy / "batches" / "001-000002.msgpack").unlink()
    error = refused(copy, capsys)
    assert "1 of 4 batches are not in" in error
    assert "001-000002.msgpack" in error
    assert "000-000002" not in error
    shutil.rmtree(copy / "batches")
    error = refused(copy, capsys)
    assert "4 of 4 batches" in error
    assert "observe.record_batches=true" in error


def test_a_batch_that_is_not_the_ledgers_is_named(
    done: Recorded, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = batch_path(copy / "batches", Version(1, 2))
    write(path, replace(done.batches[0], version=Version(1, 2)))
    error = refused(copy, capsys)
    assert f"{path} is not the batch of step 3" in error
    path.write_bytes(b"nothing")
    assert f"{path} holds no recorded batch" in refused(copy, capsys)


def test_a_checkpoint_to_begin_at_must_be_kept_and_whole(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = cut(copy, 2)
    seal(kept.parent)
    error = refused(copy, capsys, "begin=1")
    assert "keeps no checkpoint of that step; it keeps 2" in error
    assert "it came to step 4" in refused(copy, capsys, "begin=2", "steps=2")
    (kept / "queue.msgpack").write_bytes(b"nothing")
    for _ in ("another checksum", "its own checksum, but nothing in it"):
        assert main([CONF, f"run={copy}", "begin=2"]) == 2
        out, error = capsys.readouterr()
        assert "step-000002 cannot be used" in out
        assert "it keeps none" in error
        seal(kept.parent)


def test_images_that_are_gone_are_named(
    done: Recorded, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = done.batches[0]
    lost = replace(batch.groups[0].image, path=str(copy / "elsewhere"), sha256="0" * 64)
    write(
        batch_path(copy / "batches", batch.version),
        replace(batch, groups=(replace(batch.groups[0], image=lost), *batch.groups[1:])),
    )
    error = refused(copy, capsys)
    assert "the images of step 1 are not there" in error
    assert str(copy / "elsewhere") in error


def test_images_are_found_where_the_folder_was_moved_to(done: Recorded, copy: Path) -> None:
    batch = at_home(done.batches[0], copy / "images")
    for scored, before in zip(batch.groups, done.batches[0].groups, strict=True):
        assert scored.image.path == before.image.path.replace(str(done.run_dir), str(copy))
        assert Path(scored.image.path).is_file()
    assert at_home(done.batches[0], copy / "nowhere") == done.batches[0]


# ---------------------------------------------------------------- rewards and advantages


def asked(done_config: Config, step: LineStep) -> dict[str, tuple[Question, ...]]:
    with Reading(Path(done_config.run_dir) / "ledger.sqlite") as reading:
        found = {group.key: reading.questions(group.ready or 0) for group in step.groups}
    assert all(found.values())
    return {key: questions for key, questions in found.items() if questions is not None}


def recount(config: Config, batch: TrainBatch, number: int = 0) -> list[str]:
    step = surviving_line(read_rows(Path(config.run_dir) / "ledger.sqlite"))[number]
    told = {group.key: group.advantages for group in step.groups}
    assert all(told.values())
    return differences(batch, asked(config, step), told, config)


def test_rewards_and_advantages_come_out_as_recorded(done: Recorded) -> None:
    for number, batch in enumerate(surviving_batches(done)):
        assert recount(done.config, batch, number) == []


@pytest.mark.parametrize("setting", ["adaptive", "blind", "per term"])
def test_they_do_in_other_settings(setting: str, tmp_path: Path) -> None:
    config = recorded_config(tmp_path)
    if setting == "adaptive":
        config.data.questions_per_image, config.data.adaptive_questions = 1, True
        config.reward.absent = 0.3
    elif setting == "blind":
        config.reward.blind = Blind.weigh
    else:
        config.learner.advantage.per_term = True
        config.reward.length_cost, config.reward.length = 0.5, 0.2
        config.reward.length_free, config.reward.length_max = 0, 5
    batches = run_async(record(config, steps=2))
    if setting == "adaptive":
        accuracies = [p.accuracy for b in batches for scored in b.groups for p in scored.rewards]
        assert set(accuracies) - {0.0, 1 / 3, 2 / 3, None}, "every scale is 1: this shows nothing"
    for number, batch in enumerate(batches):
        assert recount(config, batch, number) == []


def test_a_changed_verdict_reward_or_weight_is_found(done: Recorded) -> None:
    batch = done.batches[0]
    first = batch.groups[0]
    key = first.group.key

    def with_first(**changed: Any) -> TrainBatch:
        return replace(batch, groups=(replace(first, **changed), *batch.groups[1:]))

    verdict = replace(first.verdicts[2][0], score=0.0)
    changed = with_first(verdicts=(*first.verdicts[:2], (verdict, first.verdicts[2][1])))
    found = recount(done.config, changed)
    assert any(f"{key}@0[2]: total 0.666" in text and "computed again 0.333" in text for text in found)
    assert any(f"{key}@0[2]: advantage" in text for text in found)

    parts = (replace(first.rewards[0], total=0.25), *first.rewards[1:])
    assert [text for text in recount(done.config, with_first(rewards=parts)) if "total" in text] == [
        f"{key}@0[0]: total 0.25, computed again 0.0"
    ]
    assert any("weights" in text for text in recount(done.config, with_first(weights=(1.0, 0.5))))


def test_advantages_that_take_the_reference_model_are_left_to_the_trainer(done: Recorded) -> None:
    config = conf.read([done.run_dir / conf.RESOLVED])
    config.learner.kl = KLConfig(coef=0.1, place=KLPlace.reward)
    assert advantages(done.batches[0], config) is None
    told = {scored.group.key: (9.0, 9.0, 9.0) for scored in done.batches[0].groups}
    assert differences(done.batches[0], {}, told, config) == []


# ---------------------------------------------------------------- parameters


def test_tensors_are_compared_bit_by_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(3.0), "c": torch.ones(2, 2)}
    save_file({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": tensors["c"]}, tmp_path / "model-00002-of-00002.safetensors")
    found = compared(7, tensors, tmp_path)
    assert found == Compared(7, tensors=3, values=7)
    assert found.equal
    near = {**tensors, "a": torch.tensor([-0.0, 1.0]), "b": torch.tensor(3.0).nextafter(torch.tensor(4.0))}
    assert compared(7, near, tmp_path).apart == {"a": 0.0, "b": pytest.approx(2.4e-7, rel=0.1)}
    assert not compared(7, {**tensors, "c": tensors["c"].bfloat16()}, tmp_path).equal
    assert compared(7, {"a": tensors["a"], "d": tensors["b"]}, tmp_path).apart == dict.fromkeys(
        ["b", "c", "d"], float("inf")
    )
    assert not compared(7, {}, tmp_path / "empty").equal


def pretended(*messages: Message) -> Any:
    """Stands for the ranks."""

    def rerun(order: Rerun) -> Iterator[Message]:
        assert [path.stem for path in order.batches] == [
            "000-000000",
            "000-000001",
            "001-000002",
            "001-000003",
        ]
        assert order.start is None
        yield from messages

    return rerun


def stepped(done: Recorded, number: int, shift: float = 0.0) -> Stepped:
    known = advantages(surviving_batches(done)[number - 1], done.config)
    assert known is not None
    moved = {name: advantage + shift for name, advantage in known.items()}
    return Stepped(number, {"loss": 0.5, "lr": 1e-3, "train_s": 0.1}, moved)


@pytest.mark.parametrize(
    ("last", "shift", "equal", "words"),
    [
        (Compared(4, 1, 1), 0.0, True, "equal: 4 steps, 1 checkpoints compared"),
        (Compared(4, 1, 1, {"w": 0.5}), 0.0, False, "not equal: parameters after step 4"),
        (Compared(4, 1, 1), 0.01, False, "not equal: 12 advantages of the executed steps"),
        (None, 0.0, False, "nothing to compare with"),
    ],
)
def test_the_last_line_and_the_exit_code_say_whether_it_is_equal(
    done: Recorded,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    last: Compared | None,
    shift: float,
    equal: bool,
    words: str,
) -> None:
    steps = [stepped(done, number) for number in (1, 2, 3)] + [stepped(done, 4, shift)]
    monkeypatch.setattr(job, "rerun", pretended(*steps, *([last] if last else [])))
    asked_for = [CONF, f"run={done.run_dir}"]
    if equal:
        assert main(asked_for) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            main(asked_for)
        assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "16 groups, 47 captions" in out
    assert "0 are different" in out
    final = out.splitlines()[-1]
    assert final.startswith("equal" if equal else "not equal")
    assert words in final


def test_a_rank_that_fails_is_one_line(
    done: Recorded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(order: Rerun) -> Iterator[Message]:
        yield stepped(done, 1)
        raise RerunFailed("rank 0: no such thing")

    monkeypatch.setattr(job, "rerun", failing)
    assert main([CONF, f"run={done.run_dir}"]) == 1
    assert capsys.readouterr().err == "error: rank 0: no such thing\n"


@pytest.mark.slow
def test_ranks_that_cannot_begin_are_one_line(done: Recorded) -> None:
    """Real processes; the policy of this run is no model."""
    order = Rerun(config=done.config, batches=(), images=done.run_dir / "images", compare={})
    with pytest.raises(RerunFailed, match="rank 0: "):
        list(ranks.rerun(order))


# ---------------------------------------------------------------- a real run


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_with_a_rollback_is_replayed_to_the_last_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    _turn(run_dir)
    moved = run_dir.rename(tmp_path / "moved")

    assert main([CONF, f"run={moved}"]) == 0
    out = capsys.readouterr().out
    assert "step-000003 belongs to steps that were rolled back" in out
    assert out.count("equal bit by bit") == 2  # after steps 2 and 4
    assert out.splitlines()[-1] == "equal: 4 steps, 2 checkpoints compared"

    path = batch_path(moved / "batches", Version(1, 3))
    write(path, _less_likely(recorded_batch(path)))
    with pytest.raises(SystemExit) as ended:
        main([CONF, f"run={moved}", "begin=2"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "steps 3 to 4" in out
    assert out.splitlines()[-1].startswith("not equal: parameters after step 4;")


def _turn(run_dir: Path) -> None:
    """Four steps of the tiny ring; after the third it goes back to the second."""
    from caprl_async.ring import cluster
    from caprl_async.ring.supervisor import Supervisor

    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={run_dir}", "steps=4", "replay.batch_groups=4"),
            *("observe.record_batches=true", "evaluate.dense_policy=", "evaluate.probe_images=0"),
            *("evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
        ]
    )
    run_dir.mkdir()
    conf.dump(config, run_dir / conf.RESOLVED)
    ring = Supervisor(config)

    def keep() -> Path:
        folder = cut(run_dir, ring.version.step)
        ring.save(folder)
        seal(folder.parent)
        return folder

    try:
        ring.start()
        ring.open_admission()
        ring.step()
        ring.step()
        second = keep()
        ring.step()
        keep()
        ring.restore(second)
        ring.step()
        ring.step()
        keep()
        ring.finish()
    finally:
        ring.stop()
        cluster.disconnect()


def _less_likely(batch: TrainBatch) -> TrainBatch:
    """The batch with another log-probability of one token."""
    first = batch.groups[0]
    caption = first.group.captions[0]
    caption = replace(caption, logprobs=(caption.logprobs[0] - 0.1, *caption.logprobs[1:]))
    group = replace(first.group, captions=(caption, *first.group.captions[1:]))
    return replace(batch, groups=(replace(first, group=group), *batch.groups[1:]))
