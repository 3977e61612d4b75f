"""`job=inspect` tells a sample's whole life, with what was rolled back, or says what samples there are."""

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from pathlib import Path

import pytest
from replay_kit import StubJudge, StubLearner, StubRollout, connected, running
from replay_kit import run as run_async
from run_kit import FILTERED, UNFINISHED, UNSCORABLE, Recorded, record, recorded, recorded_config

from caprl_async import conf
from caprl_async.config import Blind
from caprl_async.jobs import inspect
from caprl_async.observe.lineage import printable
from caprl_async.replay.events import Event, surviving
from caprl_async.replay.ledger import Judged as Judgment
from caprl_async.replay.ledger import Ledger, open_ledger, read_rows
from caprl_async.replay.line import surviving_line
from caprl_async.replay.reading import Reading, SampleName
from caprl_async.run import main
from caprl_async.types import Judged, JudgeLease, Version

CONF = f"conf={Path(conf.__file__).parent.parent / 'conf' / 'inspect.yaml'}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return recorded(tmp_path_factory.mktemp("inspect"))


class Shown:
    """What the command prints about a run."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys

    def __call__(self, sample: str = "") -> str:
        assert main([CONF, f"run={self.folder}", f"sample={sample}"]) == 0
        return self.capsys.readouterr().out

    def refused(self, sample: str) -> str:
        """The one line that it says instead."""
        assert main([CONF, f"run={self.folder}", f"sample={sample}"]) == 2
        out, error = self.capsys.readouterr()
        assert out == ""
        assert error.count("\n") == 1
        return error


@pytest.fixture
def show(done: Recorded, capsys: pytest.CaptureFixture[str]) -> Shown:
    return Shown(done.run_dir, capsys)


def test_the_summary_counts_and_names_samples_to_look_at(done: Recorded, show: Shown) -> None:
    text = show()
    assert "2 evicted, 16 trained" in text
    assert "evicted: 1 filtered, 1 unscorable" in text
    assert "4 learner steps, the newest weights are 1.4; 6 batches" in text
    assert "epoch 1 went back to step 2" in text
    assert "not as promised: nothing" in text
    trained = re.search(r"newest trained: (\S+),", text)
    assert trained is not None
    assert "in step 4" in show(trained[1])


def test_a_trained_caption_is_told_from_its_admission_to_its_advantage(done: Recorded, show: Shown) -> None:
    scored = done.batches[0].groups[0]
    assert scored.group.key == "train/0"
    text = show("train/0@0#2")
    rows = [line for line in text.splitlines() if re.match(r" \d{4}-", line)]
    told = [re.split(r"\s{2,}", line.strip())[2] for line in rows]
    assert told == ["admitted", "generating", "judging", "ready", "cut", "trained"]
    assert "rollout-0" in rows[1]
    assert "judge-0" in rows[3]
    assert "row row-0" in text
    assert scored.image.sha256 in text
    assert scored.image.path in text
    assert "(not there)" not in text
    assert "batch 0.0" in text
    assert "learner step 1" in text
    assert "weights 0.1" in text
    assert "train/0 caption 2" in text
    assert "train/0 caption 1" not in text  # only this caption
    assert "2 tokens: 0 to 1 by 0.0; finish: stop" in text
    assert "reward 0.666667 = 1 x accuracy 0.666667; 2 of 2 questions scored" in text
    assert "advantage +0.999997 in batch 0.0" in text
    fact, absent = text[text.index("q0") :].split("q1", 1)
    assert "what color is it ?" in fact
    assert re.search(r"\* blue", fact)
    assert "* unknown" not in fact
    assert re.search(r"what shape is green \?.*absent", absent)
    assert "* unknown" in absent


def test_evicted_groups_show_their_captions_and_why(show: Shown) -> None:
    filtered = show(FILTERED)
    assert "evicted: filtered" in filtered
    assert filtered.count("reward 0.333333") == 3
    assert "advantage" not in filtered
    unscorable = show(UNSCORABLE)
    assert "evicted: unscorable" in unscorable
    assert unscorable.count("no reward: 0 of 2 questions scored (reward.quorum=0.5)") == 3


def test_a_caption_that_left_its_group_has_no_advantage_and_the_others_keep_theirs(show: Shown) -> None:
    first = show(f"{UNFINISHED}@0#0")
    assert "no reward" in first
    assert "two options" in first  # the judge's reason
    assert "advantage" not in first
    assert "advantage -0.7071" in show(f"{UNFINISHED}@0#1")
    assert "advantage +0.7071" in show(f"{UNFINISHED}@0#2")


def test_what_was_rolled_back_is_marked(done: Recorded, show: Shown) -> None:
    rows = read_rows(done.ledger)
    alive = {row.seq for row in surviving(rows)}
    twice = {
        row.key for row in rows if row.event is Event.TRAINED and row.seq in alive and row.version.epoch == 1
    } & {row.key for row in rows if row.event is Event.TRAINED and row.seq not in alive}
    assert twice, "no prompt was trained on, rolled back and trained on again"
    for key in twice:
        lines = show(key).splitlines()
        events = [line for line in lines if re.match(r" \d{4}-", line)]
        void = sum(row.key == key and row.seq not in alive for row in rows)
        assert sum(line.rstrip().endswith("void") for line in events) == void > 0
        assert sum("rollback" in line for line in events) == 1
        batches = [line for line in lines if line.startswith("  batch ")]
        assert len(batches) == 2
        assert batches[0].endswith("(void: rolled back)")
        assert "void" not in batches[1]


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ("train/999", ["there is no train/999", "train/0 to train/"]),
        ("train/0@4", ["there is no train/0@4", "train/0@0"]),
        ("train/0@0#3", ["no such caption", "train/0@0#0 to #2"]),
        ("seventeen", ["train/17@0#3"]),
        ("train/17#", ["train/17@0#3"]),
    ],
)
def test_an_unknown_sample_is_one_line_that_says_what_there_is(
    show: Shown, sample: str, words: list[str]
) -> None:
    error = show.refused(sample)
    assert f"sample={sample}" in error
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("", ["run is empty"]),
        ("{parent}/rum", ["is no folder", "has run"]),
        ("{parent}", ["no conf.yaml and no ledger.sqlite"]),
    ],
)
def test_an_unknown_run_is_one_line_that_says_what_there_is(
    done: Recorded, run: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([CONF, f"run={run.format(parent=done.run_dir.parent)}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)


def test_a_ledger_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conf.yaml").write_text("steps: 3\n")
    (tmp_path / "ledger.sqlite").write_text("something else, long enough to be seen as no database" * 20)
    assert main([CONF, f"run={tmp_path}"]) == 2
    assert "ledger.sqlite cannot be read" in capsys.readouterr().err


def test_a_run_that_goes_on_can_be_read_and_is_not_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(StubJudge):
        async def handle(self, lease: JudgeLease) -> Judged:
            if len(self.seen) >= 4:  # the first batch's; what comes later waits
                await asyncio.sleep(60)
            return await super().handle(lease)

    async def whole() -> None:
        config = recorded_config(tmp_path)
        run_dir = Path(config.run_dir)
        run_dir.mkdir()
        conf.dump(config, run_dir / conf.RESOLVED)
        rollout, judge = StubRollout(), Silent()
        judge.slots = 1
        async with running(config, run_dir) as (queue, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            await learner.batch(Version(0, 0))
            with closing(open_ledger(run_dir / "ledger.sqlite")) as ledger:
                query = "select key from journal where stage = 'judging'"
                while (waiting := ledger.execute(query).fetchone()) is None:
                    await asyncio.sleep(0.02)
            for sample in ("", "train/0@0#1", waiting[0]):
                asked = conf.load([CONF, f"run={run_dir}", f"sample={sample}"])
                await asyncio.to_thread(inspect.run, asked)
            await queue.trained(Version(0, 1), 10.0, 11.0)  # the queue writes on
            assert (await queue.audit())["ended"] == {"trained": 4}

    run_async(whole())
    text = capsys.readouterr().out
    assert "0 learner steps" in text
    assert "not trained on yet" in text
    assert "waiting for a judge" in text
    assert "#2: not judged yet" in text


def test_what_the_ledger_has_folded_away_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = recorded(tmp_path, steps=3, back_to=None)
    ledger = Ledger(done.ledger)
    assert ledger.fold(ledger.position) > 8
    ledger.close()
    show = Shown(done.run_dir, capsys)
    error = show.refused("train/0")
    assert "train/0 has ended and its rows are gone" in error
    assert "replay.ledger_mb" in error
    assert "12 trained" in show()
    assert "there is no train/999" in show.refused("train/999")


def test_with_blind_questions_captions_keep_their_own_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recorded_config(tmp_path)
    config.reward.blind = Blind.weigh
    run_async(record(config, steps=1))
    with Reading(Path(config.run_dir) / "ledger.sqlite") as reading:
        (judgement,) = reading.story(SampleName("train/0")).judgements
    assert [row[0].score for row in judgement.verdicts] == [1 / 4, 2 / 4, 3 / 4]  # the empty one had 0
    assert [verdict.score for verdict in judgement.blind] == [0.0, 0.0]
    text = Shown(Path(config.run_dir), capsys)("train/0@0#2")
    assert "blind" in text
    assert "reward 0.75" in text


def test_a_run_that_began_again_at_its_beginning_has_the_steps_of_both_times(tmp_path: Path) -> None:
    """Its versions are the same ones again."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for again in (False, True):
        if again:
            ledger.roll_back(0, Version(0, 0))
        for event in (Event.ADMITTED, Event.GENERATING, Event.JUDGING, Event.READY):
            seq = ledger.record("train/0", 0, 0, event, Version(0, 0))
        ledger.record_judged(seq, Judgment("judge-0", 0, (), (), (), ()))
        for event in (Event.CUT, Event.TRAINED):
            ledger.record("train/0", 0, 0, event, Version(0, 0), oldest="0.0")
        ledger.record_step(Version(0, 1), 10.0 + again, 20.0)
    ledger.close()
    with Reading(ledger.path) as reading:
        story = reading.story(SampleName("train/0"))
    trainings = [training for judgement in story.judgements for training in judgement.trainings]
    assert [training.voided for training in trainings] == [True, False]
    assert [t.step.detail["started"] for t in trainings if t.step is not None] == [10.0, 11.0]
    assert [str(step.version) for step in surviving_line(read_rows(ledger.path))] == ["0.0"]


def test_signs_that_would_move_the_cursor_are_spelled_out() -> None:
    assert printable("a\x1b[2Jb\nc\r") == "a\\x1b[2Jb\nc\\r"


def test_help_shows_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for words in ("conf=conf/inspect.yaml run=", "conf=conf/replay.yaml run=", "sample=train/17@0#3"):
        assert words in text
